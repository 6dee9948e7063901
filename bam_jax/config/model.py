"""The model, and how it is computed."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from bam_jax.config.strict import Count, NonNegative, Positive, PositiveInt, Section, Size


class _Experts(Section):
  def check(self):
    num_experts, top_k = self.num_experts, self.top_k
    self.require(top_k <= num_experts, f'{top_k=} is above {num_experts=}.')


@dataclass(frozen=True)
class AttentionExperts(_Experts):
  """The mixture of attention (MoA) of every block; paper section 3."""

  num_experts: Size  # N
  top_k: Count = 0  # attention experts per token; 0 is soft routing, over all experts
  shared_kv: bool = False  # one key and one value projection shared by all experts
  renormalize: bool = False  # divide the k gates by their sum; no effect on soft routing


@dataclass(frozen=True)
class FFNExperts(_Experts):
  """The mixture of SwiGLU experts of every block."""

  num_experts: Size  # N
  top_k: PositiveInt = 1  # experts per token
  renormalize: bool = False  # divide the k gates by their sum; the paper does not
  # Rows of an expert's buffer over its even share, tokens * top_k / num_experts; tokens past it
  # are dropped. 0 is dropless.
  capacity_factor: NonNegative = 0.0
  # A bias that balances the experts' loads: it affects the top-k choice but not the gates.
  expert_bias: bool = False

  def check(self):
    super().check()
    wrong = f'capacity_factor={self.capacity_factor} is neither 0 (dropless) nor at least 1.'
    self.require(not 0 < self.capacity_factor < 1, wrong)


@dataclass(frozen=True)
class Model(Section):
  """The decoder-only transformer with parallel blocks; dense without the two experts' sections."""

  vocab_size: Size  # V
  d_model: Size  # D
  num_layers: Size  # L
  num_heads: Size  # H
  num_kv_heads: Size  # G, divides H
  head_dim: Size  # K, even
  ffn_dim: Size  # F, the hidden width: half of the paper's fused gate+up width
  tied_embeddings: bool = True  # the output embedding is the input embedding
  rope_theta: Positive = 10_000.0
  norm_epsilon: Positive = 1e-5
  qk_norm: bool = False  # LayerNorm of each head's query and key before RoPE, with a scale
  logit_scale: Positive = 1.0  # factor of the logits
  attention_experts: AttentionExperts | None = None
  ffn_experts: FFNExperts | None = None

  def check(self):
    num_heads, num_kv_heads = self.num_heads, self.num_kv_heads
    fits = num_heads % num_kv_heads == 0
    self.require(fits, f'{num_heads=} is not a multiple of {num_kv_heads=}.')
    self.require(self.head_dim % 2 == 0, f'head_dim={self.head_dim} is odd: RoPE rotates pairs.')

  def dense(self) -> 'Model':
    """The same model without experts."""
    return dataclasses.replace(self, attention_experts=None, ffn_experts=None)

  def dropless(self) -> 'Model':
    """The same model without a capacity: a token's output does not depend on other tokens' load."""
    experts = self.ffn_experts and dataclasses.replace(self.ffn_experts, capacity_factor=0.0)
    return dataclasses.replace(self, ffn_experts=experts)


@dataclass(frozen=True)
class Compute(Section):
  """How the model is computed; nothing here changes what is computed."""

  dtype: Literal['float32', 'bfloat16'] = 'float32'  # of activations and matmul operands
  # What the backward pass recomputes of each block: 'none' at most elementwise operations,
  # 'matmuls' also gathers sharded weights, 'attention' recomputes the FFN too, 'full' everything.
  # 'auto' is 'matmuls' if fsdp or expert shards weights, since 'none' keeps every layer's gathered
  # weights, a whole model on each device; else 'none'.
  remat: Literal['auto', 'none', 'matmuls', 'attention', 'full'] = 'auto'
  loss_chunk: Count = 0  # tokens whose float32 logits exist at once; 0: all of a micro-batch
  unroll: Size = 1  # layers per step of the scan over layers
  offload_optimizer: bool = False  # keep the optimizer's moments in host memory between steps
