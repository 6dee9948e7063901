"""Parameters, FLOPs and cache bytes of a model, counted from its sizes.

Parameters are counted by closed formulas and, in `counted`, once more from the arrays themselves;
the tests hold the two equal. Everything is a whole number, so that what must be equal is equal.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bam_jax import config
from bam_jax.model import parameters as parameter_names
from bam_jax.model import transformer
from bam_jax.parallel import sharding

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


@dataclass(frozen=True)
class _Experts:
  """How many experts there are and how many a token visits; 1 where a part is dense."""

  query: int
  query_met: int
  key_value: int
  ffn: int
  ffn_met: int
  router_columns: int
  router_biases: int


def parameters(model: config.Model) -> Parameters:
  """A model's parameters, and those of them that one token meets."""
  return Parameters(total_parts(model).total, active_parts(model).total)


def total_parts(model: config.Model) -> Parts:
  """A model's parameters by part."""
  experts = _experts(model)
  return _parts(model, experts.query, experts.ffn)


def active_parts(model: config.Model) -> Parts:
  """The parameters that one token meets, by part; paper table 9.

  Soft attention meets all of its experts. Routed attention meets the queries and outputs of its
  top-k, and every expert's keys and values: a later token may attend to them. The whole embedding
  counts, as the paper has it, though one row is read.
  """
  experts = _experts(model)
  return _parts(model, experts.query_met, experts.ffn_met)


def counted(model: config.Model) -> tuple[Parts, Parts]:
  """What `total_parts` and `active_parts` give, counted from the shapes of the arrays."""
  total = dict.fromkeys((f.name for f in dataclasses.fields(Parts)), 0)
  active = dict(total)
  abstract = transformer.Network(model, config.Compute()).abstract()
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
    path = sharding.path_of(key_path)
    part, (met, experts) = _part_of(path), _met(model, path)
    total[part] += leaf.size
    active[part] += leaf.size * met // experts
  return Parts(**total), Parts(**active)


def forward_flops(model: config.Model, context: int) -> int:
  """FLOPs of one token's forward pass, 2 for a multiply and add.

  Args:
    model: any variant.
    context: T; a token sees half of it on average, as in the paper's table 7.
  """
  return forward_parts(model, context).total


def forward_parts(model: config.Model, context: int) -> Parts:
  """FLOPs of one token's forward pass by part; paper tables 7 and 10.

  Matrix products only: norms, activations, the softmax and the embedding's look-up are free, so
  that `embeddings` is the output embedding alone. Grouped queries make keys and values smaller,
  and routers are counted in full. What padding, masked scores or routed attention computed at
  every expert cost beside it is no part of the model.
  """
  met = active_parts(model)
  scores_and_sum = 2 * context * model.num_heads * model.head_dim  # 4 of them, and the causal half
  return Parts(
    embeddings=2 * model.d_model * model.vocab_size,
    attention=2 * met.attention + model.num_layers * _experts(model).query_met * scores_and_sum,
    ffn=2 * met.ffn,
    routers=2 * model.num_layers * model.d_model * _experts(model).router_columns,
  )


def training_flops(model: config.Model, context: int) -> int:
  """FLOPs of one token's forward and backward pass, nothing recomputed."""
  return (1 + BACKWARD) * forward_flops(model, context)


def training_parts(model: config.Model, context: int) -> Parts:
  """What `training_flops` adds up, by part."""
  return forward_parts(model, context).times(1 + BACKWARD)


def matched_tokens(model: config.Model, context: int, budget: int) -> int:
  """The most tokens that a model can be trained on with `budget` FLOPs."""
  return budget // training_flops(model, context)


def cache_bytes(model: config.Model, dtype: str) -> int:
  """Bytes of keys and values that decoding keeps of one token, in all layers.

  Args:
    model: any variant; attention experts that own their keys and values keep one cache each.
    dtype: of the cache.
  """
  caches = model.num_layers * _experts(model).key_value
  itemsize = jnp.dtype(dtype).itemsize
  return caches * 2 * model.num_kv_heads * model.head_dim * itemsize


def _experts(model: config.Model) -> _Experts:
  attention, ffn = model.attention_experts, model.ffn_experts
  N = attention.num_experts if attention else 1
  return _Experts(
    query=N,
    query_met=attention.top_k or N if attention else 1,
    key_value=1 if attention is None or attention.shared_kv else N,
    ffn=ffn.num_experts if ffn else 1,
    ffn_met=ffn.top_k if ffn else 1,
    router_columns=(N if attention else 0) + (ffn.num_experts if ffn else 0),
    router_biases=ffn.num_experts if ffn and ffn.expert_bias else 0,
  )


def _parts(model: config.Model, query: int, ffn: int) -> Parts:
  """Parameters with so many experts' queries and outputs, and so many FFN experts."""
  experts, L, D = _experts(model), model.num_layers, model.d_model
  heads = query * model.num_heads + experts.key_value * model.num_kv_heads
  return Parts(
    embeddings=model.vocab_size * D * (1 if model.tied_embeddings else 2),
    norms=(L + 1) * D + (L * heads * model.head_dim if model.qk_norm else 0),
    attention=L * 2 * D * heads * model.head_dim,
    ffn=L * ffn * 3 * D * model.ffn_dim,
    routers=L * (D * experts.router_columns + experts.router_biases),
  )


def _part_of(path: str) -> str:
  *folders, name = path.split('/')
  if name in parameter_names.ROUTERS or name in parameter_names.SCALES:
    return 'routers' if name in parameter_names.ROUTERS else 'norms'
  return {'embed': 'embeddings', 'unembed': 'embeddings'}.get(folders[-1], folders[-1])


def _met(model: config.Model, path: str) -> tuple[int, int]:
  """Of how many parts of an array one token meets how many: (met, parts)."""
  attention, ffn = model.attention_experts, model.ffn_experts
  if ffn and path in ('blocks/ffn/gate', 'blocks/ffn/up', 'blocks/ffn/down'):
    return ffn.top_k, ffn.num_experts
  queries = {f'blocks/attention/{name}' for name in ('query', 'query_scale', 'out')}
  if attention and attention.top_k and path in queries:
    return attention.top_k, attention.num_experts
  return 1, 1
