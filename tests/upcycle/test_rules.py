"""The table: one row for each array of the mixture, and the row that the paper says."""

import dataclasses
import typing

import pytest
from flax import traverse_util

from bam_jax import config
from bam_jax.model import transformer
from bam_jax.upcycle import rules

METHODS = typing.get_args(config.Method)
# Arrays that become experts; norms and embeddings never do. Paper section 3.
FFN = {'ffn/gate', 'ffn/up', 'ffn/down'}
QUERY_AND_OUT = {'attention/query', 'attention/out'}
KEY_AND_VALUE = {'attention/key', 'attention/value'}
STACKED = {
  'bam_kv_experts': FFN | QUERY_AND_OUT | KEY_AND_VALUE,
  'bam_shared_kv': FFN | QUERY_AND_OUT,
  'btx': FFN,
  'sparse': FFN,
  'average': set(),
}
ROUTERS = {
  'bam_kv_experts': {'attention/router', 'ffn/router'},
  'bam_shared_kv': {'attention/router', 'ffn/router'},
  'btx': {'ffn/router'},
  'sparse': {'ffn/router'},
  'average': set(),
}


def upcycle(method: str, **changes) -> config.Upcycle:
  sources = ('seed',) if method == 'sparse' else ('seed', 'code', 'law')
  return config.Upcycle(sources, method, **({'num_experts': 4} | changes))


def paths(model: config.Model) -> dict[str, tuple]:
  abstract = transformer.Network(model, config.Compute()).abstract()
  flat = traverse_util.flatten_dict(abstract, sep='/')
  return {path: leaf.shape for path, leaf in flat.items()}


@pytest.mark.parametrize('dense', ['dense', 'untied'])
@pytest.mark.parametrize('method', METHODS)
def test_one_row_for_each_array(models, method, dense):
  mixture = rules.mixture_model(models[dense], upcycle(method))
  table = rules.rules(mixture)
  targets = [rule.target for rule in table]
  assert sorted(targets) == sorted(paths(mixture)), 'each once, and no other'
  sources = [rule.source for rule in table if rule.source]
  assert sorted(sources) == sorted(paths(models[dense])), 'each consumed once'
  assert all(rule.source in (None, rule.target) for rule in table)


@pytest.mark.parametrize('method', METHODS)
def test_what_is_stacked_drawn_and_averaged(models, method):
  table = rules.rules(rules.mixture_model(models['untied'], upcycle(method)))
  hows = {rule.target.removeprefix('blocks/'): rule.how for rule in table}
  assert {path for path, how in hows.items() if how == 'stack'} == STACKED[method]
  assert {path for path, how in hows.items() if how == 'router'} == ROUTERS[method]
  assert {rule.target for rule in table if rule.source is None} == {
    f'blocks/{path}' for path in ROUTERS[method]
  }


@pytest.mark.parametrize('method', METHODS)
def test_shapes_follow_from_the_rows(models, method):
  dense, mixture = models['dense'], rules.mixture_model(models['dense'], upcycle(method))
  before, after = paths(dense), paths(mixture)
  for rule in rules.rules(mixture):
    if rule.how == 'mean':
      assert after[rule.target] == before[rule.source]
    elif rule.how == 'stack':
      layers, *rest = before[rule.source]
      assert after[rule.target] == (layers, 4, *rest)
    else:
      assert after[rule.target] == (dense.num_layers, dense.d_model, 4)


@pytest.mark.parametrize('method', METHODS)
def test_norms_of_heads_go_where_the_heads_go(models, method):
  dense = dataclasses.replace(models['dense'], qk_norm=True)
  mixture = rules.mixture_model(dense, upcycle(method))
  table = {rule.target: rule for rule in rules.rules(mixture)}
  assert sorted(table) == sorted(paths(mixture))
  for part in ('query', 'key'):
    scale = table[f'blocks/attention/{part}_scale']
    assert scale.source == scale.target
    assert scale.how == table[f'blocks/attention/{part}'].how
    layers, *heads = paths(dense)[scale.source]
    stacked = (4,) if scale.how == 'stack' else ()
    assert paths(mixture)[scale.target] == (layers, *stacked, *heads)


def test_mixture_models(models):
  dense = models['dense']
  options = dict(top_k=2, renormalize=True, capacity_factor=1.5)
  ffn = config.FFNExperts(4, **options)
  attention = config.AttentionExperts(4, top_k=3, renormalize=True)
  bam = dict(attention_top_k=3, **options)
  make = lambda method, **options: rules.mixture_model(dense, upcycle(method, **options))
  assert make('bam_kv_experts', **bam) == dataclasses.replace(
    dense, attention_experts=attention, ffn_experts=ffn
  )
  assert make('bam_shared_kv', **bam) == dataclasses.replace(
    dense, attention_experts=dataclasses.replace(attention, shared_kv=True), ffn_experts=ffn
  )
  for method in ('btx', 'sparse'):
    assert make(method, **options) == dataclasses.replace(dense, ffn_experts=ffn)
  assert make('average') == dense
  assert make('btx', num_experts=0).ffn_experts.num_experts == 3
