"""The model, and how it is computed."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bam_jax.config.strict import Count, NonNegative, Positive, PositiveInt, Section, Size


class _Experts(Section):
  def check(self):
    num_experts, top_k = self.num_experts, self.top_k
    self.require(top_k <= num_experts, f'{top_k=} is above {num_experts=}.')


@dataclass(frozen=True)
class RopeScaling(Section):
  """Rotary frequencies for texts longer than those of pre-training, as in transformers."""

  kind: Literal['linear', 'llama3', 'yarn']
  factor: Positive
  original_length: Count = 0  # tokens of a text in pre-training, for llama3 and yarn
  low: Positive = 1.0  # llama3: below so many turns in a text of that length, divided by the factor
  high: Positive = 4.0  # and above so many unchanged
  beta_fast: Positive = 32.0  # yarn: the same two bounds
  beta_slow: Positive = 1.0
  attention_factor: NonNegative = 0.0  # yarn: of sine and cosine; 0: 0.1 ln(factor) + 1

  def check(self):
    needs = self.kind != 'linear' and not self.original_length
    self.require(not needs, f'kind={self.kind!r} requires original_length.')
    ordered = self.low < self.high and self.beta_slow < self.beta_fast
    self.require(ordered, 'low must be below high, and beta_slow below beta_fast.')


@dataclass(frozen=True)
class Rope(Section):
  """The rotary positions that an attention expert was trained with."""

  theta: Positive
  scaling: RopeScaling | None = None


@dataclass(frozen=True)
class AttentionExperts(_Experts):
  """The mixture of attention (MoA) of every block; paper section 3."""

  num_experts: Size  # N
  top_k: Count = 0  # attention experts per token; 0 is soft routing, over all experts
  shared_kv: bool = False  # one key and one value projection shared by all experts
  renormalize: bool = False  # divide the k gates by their sum; no effect on soft routing
  ropes: tuple[Rope, ...] = ()  # of each expert, in place of the model's; () is the model's for all

  def check(self):
    super().check()
    fits = len(self.ropes) in (0, self.num_experts)
    self.require(fits, f'ropes has {len(self.ropes)} entries for num_experts={self.num_experts}.')
    self.require(not (self.ropes and self.shared_kv), 'ropes: shared keys have only one rotation.')


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


class LayerKind(NamedTuple):
  """What may differ between a model's layers, beside their parameters."""

  window: int  # tokens that a token sees, itself included; 0: all before it
  theta: float  # of RoPE; 0: no rotation
  scaling: RopeScaling | None


@dataclass(frozen=True)
class Model(Section):
  """A decoder-only transformer; dense without the two experts' sections.

  The defaults are the paper's model: one LayerNorm, then attention and SwiGLU side by side.
  """

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
  # 'parallel_two_norms': attention and FFN each have a norm. 'sequential': the FFN reads the
  # residual stream after attention, through a norm of its own.
  block: Literal['parallel', 'parallel_two_norms', 'sequential'] = 'parallel'
  # With a scale, and no bias but for 'layernorm_bias'. 'rmsnorm_plus_one': all scales, those of
  # queries and keys too, are 1 + the parameter.
  norm: Literal['layernorm', 'layernorm_bias', 'rmsnorm', 'rmsnorm_plus_one'] = 'layernorm'
  # On a part's input, on its output before the sum, or one norm on each.
  norm_place: Literal['pre', 'post', 'both'] = 'pre'
  # Norm of queries and keys before RoPE: a LayerNorm of each head with a scale for each (HK), an
  # RMSNorm of each head with one scale for all (K), or an RMSNorm over all heads (HK).
  qk_norm: Literal['none', 'head_layernorm', 'head_rms', 'all_rms'] = 'none'
  biases: Literal['none', 'qkv', 'attention', 'all'] = 'none'  # of q, k, v; and out; and the FFN
  # 'geglu_tanh': the gate is GELU by its tanh formula; 'gelu': the exact one, and no gate matrix.
  ffn: Literal['swiglu', 'geglu_tanh', 'gelu'] = 'swiglu'
  rotary_layout: Literal['interleaved', 'half'] = 'interleaved'  # pairs (2i, 2i+1), or (i, i+R)
  rotary_dim: Count = 0  # channels of a head that are rotated, the first ones; 0: all
  rope_scaling: RopeScaling | None = None
  layer_types: tuple[Literal['full', 'sliding'], ...] = ()  # of each layer; () is 'full' for all
  window: Count = 0  # tokens that a token of a sliding layer sees, itself included
  window_rope_theta: NonNegative = 0.0  # of sliding layers, then unscaled; 0: as in others
  nope_layers: tuple[int, ...] = ()  # numbers of layers without rotation
  attention_scale: NonNegative = 0.0  # factor of the scores; 0: 1 / sqrt(K)
  embedding_scale: Positive = 1.0  # factor of the embedding
  residual_scale: Positive = 1.0  # factor of each part's output
  logit_scale: Positive = 1.0  # factor of the logits
  # A cap c of the scores before the mask, and of the scaled logits: c tanh(x / c); 0: none.
  attention_cap: NonNegative = 0.0
  logit_cap: NonNegative = 0.0
  attention_experts: AttentionExperts | None = None
  ffn_experts: FFNExperts | None = None
  # What routers read: the token, or the mean of its document up to and including it.
  router_input: Literal['token', 'prefix'] = 'token'
  # Of 'prefix': if not 0, a token n before has the weight (1 - 1 / router_memory)^n in the mean.
  router_memory: Count = 0
  # Rank of each FFN expert's differences from the embeddings, at most D/8; 0: it has none.
  embedding_rank: Count = 0

  def check(self):
    num_heads, num_kv_heads = self.num_heads, self.num_kv_heads
    fits = num_heads % num_kv_heads == 0
    self.require(fits, f'{num_heads=} is not a multiple of {num_kv_heads=}.')
    self.require(self.head_dim % 2 == 0, f'head_dim={self.head_dim} is odd: RoPE rotates pairs.')
    sequential = self.block == 'sequential' or self.norm_place == 'pre'
    self.require(sequential, f"norm_place={self.norm_place!r} requires block='sequential'.")
    rotary_dim, layers, L = self.rotary_dim, self.layer_types, self.num_layers
    fits = rotary_dim <= self.head_dim and rotary_dim % 2 == 0
    self.require(fits, f'{rotary_dim=} is odd or above head_dim={self.head_dim}.')
    wrong = f'layer_types has {len(layers)} entries for num_layers={L}.'
    self.require(len(layers) in (0, L), wrong)
    fits = ('sliding' in layers) == bool(self.window)
    self.require(
      fits, f'window={self.window} must be set if layer_types has sliding, and only then.'
    )
    known = all(0 <= layer < L for layer in self.nope_layers)
    self.require(known, f'nope_layers={list(self.nope_layers)} has a number that is not a layer.')
    routed = self.attention_experts or self.ffn_experts or self.router_input == 'token'
    self.require(routed, "router_input='prefix' has no effect without experts: remove it.")
    unused = f"router_memory={self.router_memory} requires router_input='prefix'."
    self.require(self.router_input == 'prefix' or not self.router_memory, unused)
    rank, largest = self.embedding_rank, self.d_model // 8
    unused = f'embedding_rank={rank} has no effect without ffn_experts: remove it.'
    self.require(self.ffn_experts or not rank, unused)
    wrong = f'embedding_rank={rank} is above d_model / 8 = {largest}: lower it.'
    self.require(rank <= largest, wrong)

  @property
  def embedding_columns(self) -> int:
    """Columns of the embeddings beside d_model: the rank for each expert."""
    return self.embedding_rank * self.ffn_experts.num_experts if self.embedding_rank else 0

  @property
  def norms(self) -> tuple[str, ...]:
    """The names of a block's norms of the residual stream."""
    before = ('norm',) if self.block == 'parallel' else ('norm', 'ffn_norm')
    after = ('attention_out_norm', 'ffn_out_norm') if self.norm_place != 'pre' else ()
    return after if self.norm_place == 'post' else before + after

  @property
  def soft_attention(self) -> bool:
    """Whether every token visits every attention expert."""
    return bool(self.attention_experts and not self.attention_experts.top_k)

  @property
  def ffn_inputs(self) -> tuple[str, ...]:
    """The names of the FFN's matrices that its tokens meet first."""
    return ('up',) if self.ffn == 'gelu' else ('gate', 'up')

  def layer_kinds(self, rope: Rope | None = None) -> tuple[LayerKind, ...]:
    """The kind of every layer, for an attention expert with this or with the model's rotation."""
    rope, kinds = rope or Rope(self.rope_theta, self.rope_scaling), []
    for number, layer in enumerate(self.layer_types or ('full',) * self.num_layers):
      sliding, theta, scaling = layer == 'sliding', rope.theta, rope.scaling
      if sliding and self.window_rope_theta:
        theta, scaling = self.window_rope_theta, None
      if number in self.nope_layers:
        theta, scaling = 0.0, None
      kinds.append(LayerKind(self.window if sliding else 0, theta, scaling))
    return tuple(kinds)

  def dense(self) -> 'Model':
    """The same model without experts."""
    routers = dict(router_input='token', router_memory=0, embedding_rank=0)
    return dataclasses.replace(self, attention_experts=None, ffn_experts=None, **routers)

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
