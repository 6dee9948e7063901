"""The table: one row for each array of the mixture, and the row that the paper says."""

import dataclasses
import typing

import pytest

from bam_jax import config
from bam_jax.upcycle import rules
from tests.upcycle.memory import specs, upcycle

METHODS = typing.get_args(config.Method)
# Arrays that become experts; norms and embeddings never do. Paper section 3.
FFN = {'ffn/gate', 'ffn/up', 'ffn/down'}
QUERY_AND_OUT = {'attention/query', 'attention/out', 'attention/query_scale'}
KEY_AND_VALUE = {'attention/key', 'attention/value', 'attention/key_scale'}
ROUTERS = {'attention/router', 'ffn/router'}
STACKED_AND_DRAWN = {
  'bam_kv_experts': (FFN | QUERY_AND_OUT | KEY_AND_VALUE, ROUTERS),
  'bam_shared_kv': (FFN | QUERY_AND_OUT, ROUTERS),
  'btx': (FFN, {'ffn/router'}),
  'sparse': (FFN, {'ffn/router'}),
  'average': (set(), set()),
}


@pytest.mark.parametrize('changes', [{}, {'tied_embeddings': False, 'qk_norm': True}], ids=str)
@pytest.mark.parametrize('method', METHODS)
def test_the_table(models, method, changes):
  dense = dataclasses.replace(models['dense'], **changes)
  mixture = rules.mixture_model(dense, upcycle(method))
  table, before, after = rules.rules(mixture), specs(dense), specs(mixture)
  assert sorted(rule.target for rule in table) == sorted(after), 'each once, and no other'
  assert sorted(r.source for r in table if r.source) == sorted(before), 'each consumed once'
  stacked, drawn = STACKED_AND_DRAWN[method]
  scales = set() if mixture.qk_norm else {'attention/query_scale', 'attention/key_scale'}
  of = lambda how: {r.target.removeprefix('blocks/') for r in table if r.how == how}
  assert (of('stack'), of('router')) == (stacked - scales, drawn)
  for rule in table:
    assert rule.source in (None, rule.target)
    if rule.how == 'mean':
      assert after[rule.target] == before[rule.source]
    elif rule.how == 'stack':
      layers, *rest = before[rule.source].shape
      assert after[rule.target].shape == (layers, 5, *rest)
    else:
      assert after[rule.target].shape == (dense.num_layers, dense.d_model, 5)


def test_mixture_models(models):
  dense = models['dense']
  options = dict(top_k=2, renormalize=True, capacity_factor=1.5)
  ffn = config.FFNExperts(5, **options)
  attention = config.AttentionExperts(5, top_k=3, renormalize=True)
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
