"""What is computed, the model, and how it is computed."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from bam_jax.config import checks
from bam_jax.errors import UserError


def _check_top_k(experts: 'AttentionExperts | FFNExperts') -> None:
  if experts.top_k > experts.num_experts:
    raise UserError(f'top_k={experts.top_k} is above num_experts={experts.num_experts}.')


@dataclass(frozen=True)
class AttentionExperts:
  """The mixture of attention (MoA) of every block; paper section 3."""

  num_experts: int  # N
  top_k: int = 0  # attention experts a token visits; 0 is soft routing, every token visits all
  shared_kv: bool = False  # one key and one value projection serve all the experts
  renormalize: bool = False  # divide the k gates by their sum; no effect on soft routing

  def __post_init__(self):
    checks.sizes(self, 'num_experts')
    checks.at_least(self, top_k=0)
    _check_top_k(self)


@dataclass(frozen=True)
class FFNExperts:
  """The mixture of SwiGLU experts of every block."""

  num_experts: int  # N
  top_k: int = 1  # experts a token visits
  renormalize: bool = False  # divide the k gates by their sum; the paper does not
  # Rows of an expert's buffer over its even share, tokens * top_k / num_experts; tokens past it
  # are dropped. 0 is dropless.
  capacity_factor: float = 0.0
  # A bias that evens the experts' loads: it counts in choosing the top-k and not in the gates.
  expert_bias: bool = False

  def __post_init__(self):
    checks.sizes(self, 'num_experts')
    checks.at_least(self, top_k=1)
    _check_top_k(self)
    if self.capacity_factor != 0 and not self.capacity_factor >= 1:
      raise UserError(
        f'capacity_factor={self.capacity_factor} is neither 0 (dropless) nor at least 1.'
      )


@dataclass(frozen=True)
class Model:
  """The decoder-only transformer with parallel blocks; dense without the two experts' sections."""

  vocab_size: int  # V
  d_model: int  # D
  num_layers: int  # L
  num_heads: int  # H
  num_kv_heads: int  # G, divides H
  head_dim: int  # K, even
  ffn_dim: int  # F, the hidden width: half of the paper's fused gate+up width
  tied_embeddings: bool = True  # the output embedding is the input embedding
  rope_theta: float = 10_000.0
  norm_epsilon: float = 1e-5
  # LayerNorm of every head's query and key before RoPE, a scale for each head and channel.
  qk_norm: bool = False
  logit_scale: float = 1.0  # what logits are multiplied by
  attention_experts: AttentionExperts | None = None
  ffn_experts: FFNExperts | None = None

  def __post_init__(self):
    checks.sizes(
        self, 'vocab_size', 'd_model', 'num_layers', 'num_heads', 'num_kv_heads', 'head_dim',
        'ffn_dim',
    )  # fmt: skip
    checks.at_least(self, vocab_size=2, head_dim=2)
    checks.positive(self, 'rope_theta', 'norm_epsilon', 'logit_scale')
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f'num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}.'
      )
    if self.head_dim % 2:
      raise UserError(f'head_dim={self.head_dim} is odd: rotary embeddings turn pairs.')

  def dense(self) -> 'Model':
    """The same model without experts."""
    return dataclasses.replace(self, attention_experts=None, ffn_experts=None)


@dataclass(frozen=True)
class Compute:
  """How the model is computed; nothing here changes what is computed."""

  dtype: Literal['float32', 'bfloat16'] = 'float32'  # of activations and matmul operands
  # What the backward pass does again of each block: 'none' at most what is elementwise, 'matmuls'
  # also gathers weights that a mesh cuts, 'attention' computes the FFN too, 'full' everything.
  remat: Literal['none', 'matmuls', 'attention', 'full'] = 'none'
  loss_chunk: int = 0  # tokens whose float32 logits exist at once; 0 is all of a micro-batch
  unroll: int = 1  # layers a step of the scan over layers
  offload_optimizer: bool = False  # keep the optimizer's moments in host memory between steps

  def __post_init__(self):
    checks.sizes(self, 'unroll')
    checks.at_least(self, loss_chunk=0)
