"""Parameters, FLOPs and cache bytes of a model, counted from its sizes, in whole numbers."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from bam_jax import config

BACKWARD = 2  # FLOPs of a backward pass over those of its forward pass: two products for each one


@dataclass(frozen=True)
class Parameters:
  """Numbers of parameters."""

  total: int
  active: int  # that one token meets: all, but of routed experts only the top-k


@dataclass(frozen=True)
class Parts:
  """A number for each part of a model, all its layers together."""

  embeddings: int = 0  # input and output; tied ones once
  norms: int = 0
  attention: int = 0
  ffn: int = 0
  routers: int = 0

  @property
  def total(self) -> int:
    return sum(dataclasses.astuple(self))

  def times(self, factor: int) -> 'Parts':
    """Every number multiplied."""
    return Parts(*(factor * number for number in dataclasses.astuple(self)))


def parameters(model: config.Model) -> Parameters:
  """A model's parameters, and those of them that one token meets."""
  return Parameters(total_parts(model).total, active_parts(model).total)


def total_parts(model: config.Model) -> Parts:
  """A model's parameters by part."""
  attention, ffn = model.attention_experts, model.ffn_experts
  queries, ffns = (experts.num_experts if experts else 1 for experts in (attention, ffn))
  return _parts(model, queries, ffns)


def active_parts(model: config.Model) -> Parts:
  """The parameters that one token meets, by part; paper table 9.

  Routed attention meets the queries and outputs of its top-k, and every expert's keys and values: a
  later token may attend to them. The whole embedding counts, though one row is read.
  """
  return _parts(model, _queries_met(model), model.ffn_experts.top_k if model.ffn_experts else 1)


def _parts(model: config.Model, queries: int, ffns: int) -> Parts:
  """Parameters with so many experts' queries and outputs, and so many FFN experts."""
  L, D, K = model.num_layers, model.d_model, model.head_dim
  H, G, kv, ffn = model.num_heads, model.num_kv_heads, _key_values(model), model.ffn_experts
  scales = {'none': 0, 'head_rms': (queries + kv) * K}.get(
    model.qk_norm, (queries * H + kv * G) * K
  )
  biases = (queries * H + 2 * kv * G) * K if model.biases != 'none' else 0
  biases += queries * D if model.biases in ('attention', 'all') else 0
  ffn_biases = len(model.ffn_inputs) * model.ffn_dim + D if model.biases == 'all' else 0
  X, ends = model.embedding_columns, 1 if model.tied_embeddings else 2
  of_norm = 2 * D if model.norm == 'layernorm_bias' else D
  return Parts(
    embeddings=ends * (model.vocab_size * (D + X) + X * D),
    norms=(L * len(model.norms) + 1) * of_norm + L * scales,
    attention=attention_matrices(model, queries) + L * biases,
    ffn=ffn_matrices(model, ffns) + L * ffns * ffn_biases,
    routers=D * _router_columns(model) + (L * ffn.num_experts if ffn and ffn.expert_bias else 0),
  )


def attention_matrices(model: config.Model, queries: int) -> int:
  """Numbers in the projections of attention, with so many experts' queries and outputs."""
  heads = queries * model.num_heads + _key_values(model) * model.num_kv_heads
  return model.num_layers * 2 * model.d_model * heads * model.head_dim


def ffn_matrices(model: config.Model, ffns: int) -> int:
  """Numbers in the matrices of so many FFN experts in each layer."""
  matrices = len(model.ffn_inputs) + 1
  return model.num_layers * ffns * matrices * model.d_model * model.ffn_dim


def forward_flops(model: config.Model, context: int) -> int:
  """FLOPs of one token's forward pass, 2 for a multiply and add; see `forward_parts`."""
  return forward_parts(model, context).total


def forward_parts(model: config.Model, context: int) -> Parts:
  """FLOPs of one token's forward pass by part, 2 for a multiply and add; paper tables 7 and 10.

  A token sees half of `context` on average, with a window w of `w - w^2 / (2 context)` tokens.
  Matrix products only: norms, activations, the softmax and the embedding's look-up are
  free, so that `embeddings` is the output embedding alone. What is computed for padding, masked
  scores or experts that routing leaves out is not part of the model.
  """
  queries, D, X = _queries_met(model), model.d_model, model.embedding_columns
  # Scores and sums are 4 FLOPs for each channel of a head and token seen: twice these on average.
  windows = [kind.window for kind in model.layer_kinds()]
  seen = [2 * w - w * w // context if 0 < w < context else context for w in windows]
  return Parts(
    # Of experts' differences all are computed, whatever their gates.
    embeddings=2 * (D + X) * model.vocab_size + 4 * X * D,
    attention=2 * attention_matrices(model, queries)
    + sum(2 * queries * model.num_heads * model.head_dim * tokens for tokens in seen),
    ffn=2 * ffn_matrices(model, model.ffn_experts.top_k if model.ffn_experts else 1),
    routers=2 * D * _router_columns(model),
  )


def training_flops(model: config.Model, context: int) -> int:
  """FLOPs of one token's forward and backward pass, nothing recomputed."""
  return training_parts(model, context).total


def training_parts(model: config.Model, context: int) -> Parts:
  """What `training_flops` adds up, by part."""
  return forward_parts(model, context).times(1 + BACKWARD)


def matched_tokens(model: config.Model, context: int, budget: int) -> int:
  """The largest number of tokens that a model can be trained on with `budget` FLOPs."""
  return budget // training_flops(model, context)


def cache_bytes(model: config.Model, dtype: str) -> int:
  """Bytes of keys and values, of this dtype, that decoding keeps of one token in all layers."""
  numbers = 2 * model.num_kv_heads * model.head_dim * jnp.dtype(dtype).itemsize
  return model.num_layers * _key_values(model) * numbers


def _queries_met(model: config.Model) -> int:
  """Attention experts that one token visits."""
  experts = model.attention_experts
  return experts.top_k or experts.num_experts if experts else 1


def _key_values(model: config.Model) -> int:
  """Sets of keys and values in a layer."""
  experts = model.attention_experts
  return experts.num_experts if experts and not experts.shared_kv else 1


def _router_columns(model: config.Model) -> int:
  """Experts that the routers of all layers, and that of the embeddings, choose among."""
  columns = sum(e.num_experts for e in (model.attention_experts, model.ffn_experts) if e)
  return model.num_layers * columns + (model.ffn_experts.num_experts if model.embedding_rank else 0)
