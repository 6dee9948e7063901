"""Parameters and FLOPs of a model, counted from its shapes."""

from dataclasses import dataclass

import jax

from bam_jax import config, sharding
from bam_jax.model import transformer


@dataclass(frozen=True)
class Parameters:
  """Numbers of parameters."""

  total: int
  active: int  # that one token meets: all, but of each layer's FFN experts only the top-k


def parameters(model: config.Model) -> Parameters:
  """Counts a model's parameters; soft and routed attention experts count as far as they are met."""
  total = active = 0
  abstract = transformer.Network(model, config.Compute()).abstract()
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
    total += leaf.size
    active += leaf.size * met_share(model, sharding.path_of(key_path), len(leaf.shape))
  return Parameters(total, round(active))


def met_share(model: config.Model, path: str, ndim: int) -> float:
  """The share of an array that one token meets."""
  _, part, *name = path.split('/')
  if part == 'ffn' and model.ffn_experts and name != ['router']:
    return model.ffn_experts.top_k / model.ffn_experts.num_experts
  experts = model.attention_experts
  if part == 'attention' and experts and experts.top_k and name in (['query'], ['out']):
    # Keys and values are met as what is attended to, whoever the query's experts are.
    return experts.top_k / experts.num_experts
  return 1.0


def forward_flops(model: config.Model, context: int) -> float:
  """FLOPs of one token's forward pass, 2 for a multiply and add; embedding look-up is free.

  Args:
    model: any variant.
    context: T; a token sees half of it on average, as in the paper's table 7.
  """
  D, H, G, K = model.d_model, model.num_heads, model.num_kv_heads, model.head_dim
  experts = model.attention_experts
  query_and_out = 4 * D * H * K
  key_and_value = 4 * D * G * K
  scores_and_sum = 2 * context * H * K
  visited = keys = 1
  router = 0
  if experts:
    visited = experts.top_k or experts.num_experts
    keys = 1 if experts.shared_kv else experts.num_experts
    router += 2 * D * experts.num_experts
  attention = visited * (query_and_out + scores_and_sum) + keys * key_and_value
  ffn = 6 * D * model.ffn_dim
  if model.ffn_experts:
    ffn *= model.ffn_experts.top_k
    router += 2 * D * model.ffn_experts.num_experts
  return model.num_layers * (attention + ffn + router) + 2 * D * model.vocab_size


def training_flops(model: config.Model, context: int) -> float:
  """FLOPs of one token's forward and backward pass, nothing recomputed."""
  return 3 * forward_flops(model, context)
