"""What becomes of every array when dense models are mixed: one row for each target path."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

from bam_jax import config
from bam_jax.checkpoint import manifest

How = Literal['mean', 'stack', 'router', 'zero']


class Rule(NamedTuple):
  """`target` is made from the sources' `source` by `how`."""

  target: str  # path in the mixture
  how: How  # 'mean' over the sources, 'stack' on axis 1, 'router': drawn, 'zero': zeros
  source: str | None  # path in every dense model; None for what no source has


def mixture_model(dense: config.Model, upcycle: config.Upcycle) -> config.Model:
  """The model that a method makes of dense ones."""
  attention = ffn = None
  if upcycle.method in ('bam_kv_experts', 'bam_shared_kv'):
    attention = config.AttentionExperts(
      num_experts=upcycle.experts,
      top_k=upcycle.attention_top_k,
      shared_kv=upcycle.method == 'bam_shared_kv',
      renormalize=upcycle.renormalize,
    )
  if upcycle.method != 'average':
    ffn = config.FFNExperts(
      num_experts=upcycle.experts,
      top_k=upcycle.top_k,
      renormalize=upcycle.renormalize,
      capacity_factor=upcycle.capacity_factor,
      expert_bias=upcycle.expert_bias,
    )
  return dataclasses.replace(dense, attention_experts=attention, ffn_experts=ffn)


def rules(mixture: config.Model) -> tuple[Rule, ...]:
  """The table for a mixture.

  Experts are stacked; norms, embeddings and whatever has no experts are averaged; paper section 3.
  """
  attention, ffn = mixture.attention_experts, mixture.ffn_experts
  query_out = 'stack' if attention else 'mean'
  key_value = 'stack' if attention and not attention.shared_kv else 'mean'
  hows: dict[str, How] = {
    'embed/table': 'mean',
    'blocks/norm/scale': 'mean',
    'blocks/attention/query': query_out,
    'blocks/attention/key': key_value,
    'blocks/attention/value': key_value,
    'blocks/attention/out': query_out,
    'blocks/ffn/gate': 'stack' if ffn else 'mean',
    'blocks/ffn/up': 'stack' if ffn else 'mean',
    'blocks/ffn/down': 'stack' if ffn else 'mean',
    'final_norm/scale': 'mean',
  }
  if mixture.qk_norm:  # the norm of a head goes where the head goes
    hows |= {'blocks/attention/query_scale': query_out, 'blocks/attention/key_scale': key_value}
  if not mixture.tied_embeddings:
    hows['unembed/kernel'] = 'mean'
  table = [Rule(path, how, path) for path, how in hows.items()]
  if attention:
    table.append(Rule('blocks/attention/router', 'router', None))
  if ffn:
    table.append(Rule('blocks/ffn/router', 'router', None))
  if ffn and ffn.expert_bias:
    table.append(Rule('blocks/ffn/expert_bias', 'zero', None))
  return tuple(table)


def expert_names(upcycle: config.Upcycle, sources: Sequence[str]) -> tuple[str, ...]:
  """The name of each expert's source, from the sources' names."""
  return (*sources, *[sources[0]] * len(upcycle.copies))


def record(mixture: config.Model) -> tuple[manifest.Made, ...]:
  """The table as a manifest has it."""
  return tuple(manifest.Made(*rule) for rule in rules(mixture))
