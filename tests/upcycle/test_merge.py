"""Merged arrays against NumPy on every mesh, refusals, and proofs by what the mixtures compute."""

import copy
import dataclasses
import functools
import typing

import jax
import numpy as np
import pytest

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.model import transformer
from bam_jax.upcycle import merge, rules
from tests.upcycle import memory
from tests.upcycle.memory import draw, flat, mix, spelled_out, upcycle

METHODS = typing.get_args(config.Method)
STACKED = {
  'bam_kv_experts': ('ffn/', 'attention'),
  'bam_shared_kv': ('ffn/', 'attention/query', 'attention/out'),
  'btx': ('ffn/',),
  'sparse': ('ffn/',),
  'average': (),
}


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', ['dense', 'untied', 'biased'])
def test_merged_arrays(models, name, method):
  biased = dict(block='parallel_two_norms', norm='layernorm_bias', biases='all', ffn='geglu_tanh')
  more = biased if name == 'biased' else {}
  dense, how = dataclasses.replace(models['dense' if more else name], **more), upcycle(method)
  sources = [draw(dense, seed) for seed in range(len(how.sources))]
  before = copy.deepcopy(sources)
  merged, arrays = flat(mix(sources, dense, how)), [flat(source) for source in sources]
  jax.tree.map(np.testing.assert_array_equal, sources, before)
  wanted = flat(memory.abstract(rules.mixture_model(dense, how)))
  assert {k: (x.shape, x.dtype) for k, x in merged.items()} == {
    k: (x.shape, x.dtype) for k, x in wanted.items()
  }
  for path in arrays[0]:
    if path.removeprefix('blocks/').startswith(STACKED[method] or '-'):
      for expert in range(5):
        origin = expert if expert < len(arrays) else 0  # experts past the sources copy the first
        np.testing.assert_array_equal(merged[path][:, expert], arrays[origin][path], err_msg=path)
    else:
      mean = np.mean([array[path].astype(np.float64) for array in arrays], axis=0)
      np.testing.assert_allclose(merged[path], mean, rtol=1e-5, atol=1e-7, err_msg=path)


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


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
MESHES = [config.Mesh(data=2, fsdp=2, tensor=2), config.Mesh(fsdp=2, expert=2, tensor=2)]


@pytest.mark.parametrize('method, changes', [
  ('bam_shared_kv', dict(norms='fold')), ('sparse', {}),
  *(slow(method, {}) for method in METHODS),
  ('bam_kv_experts', dict(average='first', expert_bias=True)),
])  # fmt: skip
def test_no_mesh_changes_a_bit(models, method, changes):
  changes |= {} if method == 'average' else {'num_experts': 6}
  dense, how = models['untied'], upcycle(method, **changes)
  sources = [draw(dense, seed) for seed in range(len(how.sources))]
  want = spelled_out(sources, dense, how)
  for mesh in (memory.ONE_DEVICE, *MESHES):
    made = flat(mix(sources, dense, how, mesh=mesh))
    for path, array in want.items():
      np.testing.assert_array_equal(made[path], array, err_msg=path)


def test_only_what_is_needed_is_read_and_made(models):
  """As on one of several hosts: half of the experts, one quarter of each matrix."""
  how = upcycle('btx', num_experts=4)
  sources = [memory.source(models['dense'], draw(models['dense'], seed)) for seed in range(3)]
  wanted = memory.specs(rules.mixture_model(models['dense'], how))
  parts = {path: tuple((0, n // 2) for n in spec.shape) for path, spec in wanted.items()}
  parts['blocks/ffn/up'] = (0, 2), (2, 4), (8, 16), (0, 48)  # of LEDF
  read = []
  made = list(
    merge.regions(merge.Merge(sources, how, memory.KEY), wanted, parts, lambda *x: read.append(x))
  )
  up = [(source, x.shape) for source, path, _, x in read if path == 'blocks/ffn/up']
  assert up == [(0, (8, 48)), (2, (8, 48))] * 2
  assert {index for path, index, _ in made if path == 'blocks/ffn/up'} == {
    (layer, expert, slice(8, 16), slice(0, 48)) for layer in range(2) for expert in (2, 3)
  }
  assert {x.shape for _, path, _, x in read if path == 'embed/table'} == {(160, 16)}


def test_routers_are_random_in_the_right_measure(models):
  wide = dataclasses.replace(models['dense'], d_model=256, num_heads=2, head_dim=2, ffn_dim=2)
  sources = [draw(wide, seed) for seed in range(3)]
  router = lambda method, key=memory.KEY, **changes: flat(
    mix(sources, wide, upcycle(method, **({'num_experts': 8} | changes)), key)
  )
  drawn = router('bam_kv_experts')
  one, other = drawn['blocks/attention/router'], drawn['blocks/ffn/router']
  for array in (one, other):
    assert abs(array.mean()) < 4 / 16 / array.size**0.5
    assert array.std() == pytest.approx(1 / 16, rel=0.05)
    assert len(np.unique(array)) > 0.99 * array.size, 'no layer or expert is like another'
  assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1
  double = router('bam_kv_experts', router_scale=2.0)
  np.testing.assert_allclose(double['blocks/ffn/router'], 2 * other, rtol=1e-6)
  # The draw is a function of key and path: neither the other arrays nor the method matter.
  sources = [draw(wide, seed + 9) for seed in range(3)]
  np.testing.assert_array_equal(router('btx')['blocks/ffn/router'], other)
  another = router('btx', jax.random.key(12))['blocks/ffn/router']
  assert (another != other).mean() > 0.99


def test_a_value_that_is_not_finite_is_refused(models):
  sources = [draw(models['dense'], seed) for seed in range(3)]
  sources[2]['blocks']['attention']['out'][1, 3, 0, 30] = np.inf
  with pytest.raises(UserError, match=r'source 2 has inf at blocks/attention/out\[1, 3, 0, 30\]:'):
    mix(sources, models['dense'], upcycle('btx'), mesh=MESHES[0])


# What mixtures compute.


def logits(params: dict, model: config.Model, batch: dict) -> np.ndarray:
  network = transformer.Network(model, config.Compute())

  @jax.jit
  def run(params, tokens, segments, positions):
    return network.logits(params, network.hidden(params, tokens, segments, positions)[0])

  got = run(params, batch['tokens'], batch['segments'], batch['positions'])
  return np.asarray(got)[batch['segments'] > 0]


def close(got: np.ndarray, want: np.ndarray) -> None:
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
  'method, changes',
  [
    ('bam_kv_experts', {}),
    ('bam_shared_kv', dict(attention_top_k=1)),
    ('btx', dict(top_k=3)),
    slow('bam_shared_kv', {}),
    slow('btx', {}),
    slow('sparse', {}),
    slow('average', {}),
  ],
  ids=str,
)
def test_a_mixture_of_one_model_is_that_model(models, make_batch, method, changes):
  how = upcycle(method, renormalize=True, **changes)
  source, batch = draw(models['dense'], 5), make_batch(2, 8)
  merged = mix([source] * len(how.sources), models['dense'], how)
  mixture = rules.mixture_model(models['dense'], how)
  close(logits(merged, mixture, batch), logits(source, models['dense'], batch))


def test_without_renormalising_the_gate_scales_the_ffn(models, make_batch):
  # As in the paper: the top gate is below 1, so that even equal experts are not the dense model.
  how = upcycle('btx', router_scale=0.0, num_experts=4)
  source, batch = draw(models['dense'], 5), make_batch(2, 8)
  merged = mix([source] * 3, models['dense'], how)
  scaled = copy.deepcopy(source)
  scaled['blocks']['ffn']['down'] /= 4  # four equal gates
  got = logits(merged, rules.mixture_model(models['dense'], how), batch)
  close(got, logits(scaled, models['dense'], batch))
  assert np.abs(got - logits(source, models['dense'], batch)).max() > 1e-2


SEQUENTIAL = dict(block='sequential', norm='rmsnorm', biases='qkv')
GEMMA = dict(block='sequential', norm='rmsnorm_plus_one', norm_place='both', ffn='geglu_tanh')
TWO_NORMS = dict(block='parallel_two_norms', ffn='gelu', biases='all')


@pytest.mark.parametrize('method, norms, changes', [
  ('bam_kv_experts', 'mean', {}), slow('btx', 'mean', {}), slow('bam_shared_kv', 'mean', {}),
  ('bam_kv_experts', 'fold', {}), ('bam_kv_experts', 'fold', SEQUENTIAL),
  slow('btx', 'fold', SEQUENTIAL), slow('bam_kv_experts', 'fold', GEMMA),
  slow('bam_kv_experts', 'fold', TWO_NORMS),
])  # fmt: skip
def test_a_router_that_knows_one_expert_gives_its_source(
  models, make_batch, method, norms, changes
):
  """Each source's experts, with norms of their own if these are folded; the rest is averaged."""
  dense, how = dataclasses.replace(models['dense'], **changes), upcycle(method, norms=norms)
  sources, batch = [draw(dense, seed) for seed in range(3)], make_batch(2, 8)
  attention = method != 'btx'
  own = {'ffn': sources[0]['blocks']['ffn'].keys()}
  if attention:
    shared = {'key', 'value'} if method == 'bam_shared_kv' else set()
    own['attention'] = sources[0]['blocks']['attention'].keys() - shared
  for source in sources:
    source['embed']['table'][:, 0] = 100  # what all tokens share, and by which routers decide
    for name in ('out', 'down'):  # which they still do behind attention
      source['blocks']['attention' if name == 'out' else 'ffn'][name][..., 0] = 0
    if norms == 'mean':
      source['blocks']['norm']['scale'][:] = 1
  if norms == 'fold':
    before = {'ffn': 'ffn_norm' if changes else 'norm', 'attention': 'norm'}
    own |= {before[part]: ['scale'] for part in list(own)}
  merged = mix(sources, dense, how)
  soup = mix(sources, dense, upcycle('average'))
  for expert in range(3):
    force = np.zeros((2, dense.d_model, 5), np.float32)
    force[:, 0, expert] = 100  # the other gates vanish in float32
    mixed, want = copy.deepcopy(merged), copy.deepcopy(soup)
    mixed['blocks']['ffn']['router'] = force
    if attention:
      mixed['blocks']['attention']['router'] = force
    for part, names in own.items():
      want['blocks'][part] |= {name: sources[expert]['blocks'][part][name] for name in names}
    close(logits(mixed, rules.mixture_model(dense, how), batch), logits(want, dense, batch))
