"""Merged arrays against a direct computation, refusals, and proofs by what the mixtures compute."""

import copy
import dataclasses
import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.model import attention, block, transformer
from bam_jax.model import ffn as ffn_lib
from bam_jax.model.kernels import attention as kernels
from bam_jax.model.tokens import Tokens
from bam_jax.parallel.collectives import Layout
from bam_jax.upcycle import merge, rules

METHODS = typing.get_args(config.Method)
KEY = jax.random.key(11)
NAMES = ('seed', 'code', 'law')
STACKED = {
  'bam_kv_experts': ('ffn', 'attention'),
  'bam_shared_kv': ('ffn', 'attention/query', 'attention/out'),
  'btx': ('ffn',),
  'sparse': ('ffn',),
  'average': (),
}


def abstract(model: config.Model) -> dict:
  return transformer.Network(model, config.Compute()).abstract()


def flat(tree: dict) -> dict[str, np.ndarray]:
  return traverse_util.flatten_dict(tree, sep='/')


def draw(model: config.Model, seed: int) -> dict:
  """Parameters in NumPy; scales too are random, so that no mean of them is right by luck."""
  rng = np.random.default_rng(seed)
  draw_one = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / leaf.shape[-1] ** 0.5
  return jax.tree.map(draw_one, abstract(model))


def options(method: str, **changes) -> config.Upcycle:
  """Three sources and four experts, so that the last is a copy; `sparse` has one source."""
  sources = NAMES[:1] if method == 'sparse' else NAMES
  return config.Upcycle(sources, method, **({'num_experts': 4} | changes))


def mix(sources, dense, upcycle, key=KEY) -> tuple[dict, config.Model]:
  mixture = rules.mixture_model(dense, upcycle)
  return merge.merge(sources, abstract(mixture), mixture, upcycle, key), mixture


@pytest.fixture(params=['dense', 'untied'])
def dense(request, models) -> config.Model:
  return models[request.param]


@pytest.mark.parametrize('method', METHODS)
def test_merged_arrays(dense, method):
  upcycle = options(method)
  sources = [draw(dense, seed) for seed in range(len(upcycle.sources))]
  merged, mixture = mix(sources, dense, upcycle)
  merged, arrays = flat(merged), [flat(source) for source in sources]
  assert {k: (x.shape, x.dtype) for k, x in merged.items()} == {
    k: (x.shape, x.dtype) for k, x in flat(abstract(mixture)).items()
  }
  for path in arrays[0]:
    if path.removeprefix('blocks/').startswith(STACKED[method] or '-'):
      for expert in range(4):
        origin = expert if expert < len(arrays) else 0
        np.testing.assert_array_equal(merged[path][:, expert], arrays[origin][path], err_msg=path)
    else:
      mean = np.mean([array[path].astype(np.float64) for array in arrays], axis=0)
      np.testing.assert_allclose(merged[path], mean, rtol=1e-5, atol=1e-7, err_msg=path)
  assert all(isinstance(x, np.ndarray) for x in merged.values())


def test_more_experts_copy_the_first_source(models):
  sources = [draw(models['dense'], seed) for seed in range(2)]
  upcycle = config.Upcycle(('a', 'b'), 'bam_kv_experts', num_experts=6)
  merged = flat(mix(sources, models['dense'], upcycle)[0])
  for path in ('blocks/ffn/up', 'blocks/attention/key'):
    for expert, origin in enumerate([0, 1, 0, 0, 0, 0]):
      np.testing.assert_array_equal(merged[path][:, expert], flat(sources[origin])[path])


def test_sources_are_not_changed(models):
  sources = [draw(models['dense'], seed) for seed in range(3)]
  before = copy.deepcopy(sources)
  merged, _ = mix(sources, models['dense'], options('average'))
  jax.tree.map(np.testing.assert_array_equal, sources, before)
  for array in flat(merged).values():
    assert not any(np.shares_memory(array, x) for source in sources for x in flat(source).values())


def test_routers_are_random_in_the_right_measure(models):
  wide = dataclasses.replace(models['dense'], d_model=256, num_heads=2, head_dim=2, ffn_dim=2)
  sources = [draw(wide, seed) for seed in range(3)]
  router = lambda method, key=KEY, **changes: flat(
    mix(sources, wide, options(method, **changes), key)[0]
  )
  drawn = router('bam_kv_experts', num_experts=8)
  one, other = drawn['blocks/attention/router'], drawn['blocks/ffn/router']
  for array in (one, other):
    assert abs(array.mean()) < 4 / 16 / array.size**0.5
    assert array.std() == pytest.approx(1 / 16, rel=0.05)
    assert len(np.unique(array)) > 0.99 * array.size, 'no layer or expert is like another'
  assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1
  double = router('bam_kv_experts', num_experts=8, router_scale=2.0)
  np.testing.assert_allclose(double['blocks/ffn/router'], 2 * other, rtol=1e-6)
  assert not router('btx', router_scale=0.0)['blocks/ffn/router'].any()
  # The draw is a function of key and path: neither the other arrays nor the method matter.
  np.testing.assert_array_equal(router('btx', num_experts=8)['blocks/ffn/router'], other)
  sources = [draw(wide, seed + 9) for seed in range(3)]
  np.testing.assert_array_equal(router('btx', num_experts=8)['blocks/ffn/router'], other)
  another = router('btx', jax.random.key(12), num_experts=8)['blocks/ffn/router']
  assert (another != other).mean() > 0.99


def refused(sources, models, upcycle=None) -> str:
  with pytest.raises(UserError) as caught:
    mix(sources, models['dense'], upcycle or options('btx'))
  return str(caught.value)


def test_a_missing_array_is_refused(models):
  sources = [draw(models['dense'], seed) for seed in range(3)]
  del sources[1]['blocks']['attention']['key']
  assert refused(sources, models) == 'Source 1 has no blocks/attention/key.'


def test_an_array_that_nobody_wants_is_refused(models):
  sources = [draw(models['dense'], seed) for seed in range(3)]
  sources[2]['blocks']['attention']['bias'] = np.zeros(3, np.float32)
  message = refused(sources, models)
  assert 'Source 2' in message and 'blocks/attention/bias' in message


@pytest.mark.parametrize('which', [(2,), (0, 1, 2)], ids=['one source', 'all sources'])
@pytest.mark.parametrize('path', ['ffn/up', 'attention/query'])
def test_a_shape_that_is_wrong_is_refused(models, which, path):
  sources = [draw(models['dense'], seed) for seed in range(3)]
  part, name = path.split('/')
  for source in which:
    layer = sources[source]['blocks'][part]
    layer[name] = layer[name][..., :-1]
  message = refused(sources, models)
  assert f'blocks/{path}' in message and 'shape' in message


@pytest.mark.parametrize('count', [1, 2, 4])
def test_another_number_of_sources_is_refused(models, count):
  # A source too few would become one more copy of the first without a word.
  sources = [draw(models['dense'], seed) for seed in range(count)]
  with pytest.raises((UserError, ValueError)):
    mix(sources, models['dense'], options('btx'))


def test_a_mixture_among_the_sources_is_refused(models):
  upcycle = options('btx')
  sources = [draw(models['dense'], 0), draw(models['btx'], 1), draw(models['dense'], 2)]
  assert 'blocks/ffn/router' in refused(sources, models, upcycle)


def test_a_target_that_the_rules_do_not_make_is_a_mistake_in_the_code(models):
  upcycle = options('btx')
  mixture = rules.mixture_model(models['dense'], upcycle)
  sources = [draw(models['dense'], seed) for seed in range(3)]
  target = abstract(rules.mixture_model(models['untied'], upcycle))
  with pytest.raises(ValueError, match='unembed/kernel'):
    merge.merge(sources, target, mixture, upcycle, KEY)


def logits(params: dict, model: config.Model, batch: dict) -> np.ndarray:
  network = transformer.Network(model, config.Compute())

  def run(params, tokens, segments, positions):
    return network.logits(params, network.hidden(params, tokens, segments, positions)[0])

  compiled = jax.jit(run)
  got = compiled(params, batch['tokens'], batch['segments'], batch['positions'])
  return np.asarray(got)[batch['segments'] > 0]


@pytest.mark.parametrize(
  'method, changes',
  [
    ('bam_kv_experts', {}),
    ('bam_kv_experts', dict(attention_top_k=2, top_k=2)),
    ('bam_shared_kv', {}),
    ('bam_shared_kv', dict(attention_top_k=1)),
    ('btx', {}),
    ('btx', dict(top_k=3)),
    ('sparse', {}),
    ('average', {}),
  ],
  ids=str,
)
def test_a_mixture_of_one_model_is_that_model(models, make_batch, method, changes):
  upcycle = options(method, renormalize=True, **changes)
  source, batch = draw(models['dense'], 5), make_batch(2, 8)
  merged, mixture = mix([source] * len(upcycle.sources), models['dense'], upcycle)
  want = logits(source, models['dense'], batch)
  np.testing.assert_allclose(
    logits(merged, mixture, batch), want, rtol=0, atol=1e-5 * np.abs(want).max()
  )


def test_without_renormalising_the_gate_scales_the_ffn(models, make_batch):
  # As in the paper: the top gate is below 1, so that even equal experts are not the dense model.
  source, batch = draw(models['dense'], 5), make_batch(2, 8)
  merged, mixture = mix([source] * 3, models['dense'], options('btx', router_scale=0.0))
  scaled = copy.deepcopy(source)
  scaled['blocks']['ffn']['down'] /= 4  # four equal gates
  want = logits(scaled, models['dense'], batch)
  got = logits(merged, mixture, batch)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
  assert np.abs(got - logits(source, models['dense'], batch)).max() > 1e-2


def layer(params: dict, part: str, number: int) -> dict:
  return jax.tree.map(lambda x: jnp.asarray(x[number]), params['blocks'][part])


def call(cls, params: dict, *inputs) -> np.ndarray:
  """One layer of an attention or FFN module, with these parameters."""

  @jax.jit
  def run(params):
    graph, state = block.nnx.split(cls(rngs=block.nnx.Rngs(0)))
    block.nnx.replace_by_pure_dict(state, params)
    return block.nnx.merge(graph, state)(*inputs)[0]

  return np.asarray(run(params))


@pytest.mark.parametrize('method', ['bam_kv_experts', 'btx', 'bam_shared_kv'])
@pytest.mark.parametrize('expert', range(3))
def test_a_router_that_knows_one_expert_gives_its_source(models, method, expert):
  model = models['dense']
  sources = [draw(model, seed) for seed in range(3)]
  merged, mixture = mix(sources, model, options(method))
  rng = np.random.default_rng(1)
  y_BTD = rng.normal(size=(2, 6, model.d_model)).astype(np.float32)
  y_BTD[..., 0] = 1  # what all tokens share, and by which the router decides
  positions_BT = np.tile(np.arange(6, dtype=np.int32), (2, 1))
  turn = attention.rotary(positions_BT, model.head_dim, model.rope_theta, jnp.float32)
  real_BT = np.ones((2, 6), bool)
  tokens = Tokens(turn, kernels.plain(jnp.ones((2, 6), jnp.int32)), real_BT, real_BT)
  force = np.zeros((model.d_model, 4), np.float32)
  force[0, expert] = 100  # the other gates vanish in float32

  mixed = layer(merged, 'ffn', 1) | {'router': jnp.asarray(force)}
  one_device = Layout()
  got = call(partial(ffn_lib.MixtureOfFFN, mixture, one_device), mixed, y_BTD, tokens)
  want = call(partial(ffn_lib.FFN, model), layer(sources[expert], 'ffn', 1), y_BTD, tokens)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())

  if mixture.attention_experts is None:
    return
  own = layer(sources[expert], 'attention', 1)
  if mixture.attention_experts.shared_kv:  # its own queries, everybody's keys and values
    own |= {name: layer(merged, 'attention', 1)[name] for name in ('key', 'value')}
  mixed = layer(merged, 'attention', 1) | {'router': jnp.asarray(force)}
  got = call(partial(attention.MixtureOfAttention, mixture, one_device), mixed, y_BTD, tokens)
  want = call(partial(attention.Attention, model), own, y_BTD, tokens)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
