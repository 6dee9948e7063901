"""Options beyond the paper: balance over a step, biases that balance, and stages of training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.model import arithmetic, block, router, transformer
from bam_jax.parallel import sharding
from bam_jax.recipes import graph
from bam_jax.train import balance, stages, step
from bam_jax.upcycle import rules
from tests.account.test_accounting import counted
from tests.upcycle import memory

OPTIMIZER = config.Optimizer(epsilon=1e-2, clip_norm=0, weight_decay=0.1)
LOSS = config.Loss(load_balance=0.3, router_z=0.2)
GLOBAL = dataclasses.replace(LOSS, balance_over='global_batch')
RATE = 0.1


@pytest.fixture(scope='module')
def biased(models) -> config.Model:
  experts = dataclasses.replace(models['btx'].ffn_experts, expert_bias=True)
  return dataclasses.replace(models['btx'], ffn_experts=experts)


@functools.cache
def init(model: config.Model) -> dict:
  return jax.device_get(
    jax.jit(transformer.Network(model, config.Compute()).init)(jax.random.key(3))
  )


def compiled(model, batch, *, loss=LOSS, grad_accum_steps=1, staged=stages.Stages(), rate=RATE):  # noqa: B008
  """The function state, learning rate -> state, metrics of one step; and a state to start from."""
  mesh = sharding.make_mesh(config.Mesh())
  with jax.set_mesh(mesh):
    abstract = step.abstract_state(model, config.Compute(), OPTIMIZER, mesh)
    state = step.State(
      init(model), jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract.opt_state)
    )
    make = step.train_step(model, config.Compute(), loss, OPTIMIZER, grad_accum_steps, mesh, staged)
    run = make.lower(state, batch, rate).compile()

  def call(state, rate):
    with jax.set_mesh(mesh):
      # Copies, for the step takes its state's buffers.
      return jax.device_get(run(jax.tree.map(jnp.array, state), batch, rate))

  return call, state


def once(model, batch, rate=RATE, **options):
  call, state = compiled(model, batch, rate=rate, **options)
  return call(state, rate)


def flat(params: dict) -> dict[str, np.ndarray]:
  return traverse_util.flatten_dict(params, sep='/')


def near(got, want, tolerance=1e-5) -> bool:
  return np.abs(got - want).max() <= tolerance * (np.abs(want).max() or 1)


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['btx', 'routed_attention'])
def test_balance_over_the_global_batch_knows_no_micro_batches(models, make_batch, variant):
  batch = make_batch(8, 12, seed=1)
  whole, whole_metrics = once(models[variant], batch, loss=GLOBAL)
  parts, parts_metrics = once(models[variant], batch, loss=GLOBAL, grad_accum_steps=4)
  assert near(parts_metrics.loss, whole_metrics.loss, 1e-6)
  for got, want in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
    assert near(got, want)
  # Another objective than each micro-batch's own, or nothing here is tested.
  _, own = once(models[variant], batch, grad_accum_steps=4)
  assert abs(own.loss - whole_metrics.loss) > 1e-3


@pytest.mark.slow
def test_one_micro_batch_is_the_global_batch(models, make_batch):
  batch = make_batch(4, 6)
  got, want = (once(models['btx'], batch, loss=loss) for loss in (GLOBAL, LOSS))
  jax.tree.map(np.testing.assert_array_equal, got, want)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=4))
def test_losses_of_parts_add_up(loads):
  def stats(load):
    load = np.array(load, np.int32)
    gate = load[::-1] * 0.7 + 0.1
    zero = np.float32(0)
    return router.Statistics(load.sum(), load, gate, load[0] ** 2, zero, zero)

  parts = [stats(load) for load in loads]
  whole = jax.tree.map(lambda *x: sum(x), *parts)
  for term in (router.load_balance, router.router_z):
    total = sum(float(term(part, whole)) for part in parts)
    assert total == pytest.approx(float(term(whole, whole)), rel=1e-5, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
  st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=3),
  st.integers(1, 3),
)
def test_bias_update(choices, k):
  model = config.Model(
    vocab_size=5, d_model=2, num_layers=len(choices), num_heads=1, num_kv_heads=1, head_dim=2,
    ffn_dim=2, ffn_experts=config.FFNExperts(3, top_k=k, expert_bias=True),
  )  # fmt: skip
  start = np.linspace(-0.3, 0.2, 3 * len(choices), dtype=np.float32).reshape(-1, 3)
  params = {'blocks': {'ffn': {'expert_bias': start, 'up': np.ones(2)}}, 'embed': np.ones(1)}
  zero = np.float32(0)
  load = np.array(choices, np.int32)
  routing = block.Routing(None, router.Statistics(zero, load, load, zero, zero, zero))
  update = balance.bias_update(model, config.Loss(expert_bias_update_rate=0.25), stages.Stages())
  got = update(params, routing)
  for layer, counts in enumerate(choices):
    for expert, count in enumerate(counts):
      want = start[layer, expert] + 0.25 * np.sign(sum(counts) - 3 * count)
      assert got['blocks']['ffn']['expert_bias'][layer, expert] == pytest.approx(want)
  assert (
    got['embed'] is params['embed'] and got['blocks']['ffn']['up'] is params['blocks']['ffn']['up']
  )


@pytest.mark.parametrize('k', [1, 2])
def test_bias_chooses_and_does_not_weigh(k):
  gates = np.array([[[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]], np.float32)
  got = router.choose_biased(gates, np.array([-0.4, 0, 0.05], np.float32), k, False)
  # Biased: 0.1 0.3 0.25 and -0.2 0.3 0.55.
  np.testing.assert_array_equal(got[1], np.array([[[1, 2], [2, 1]]])[..., :k])
  np.testing.assert_array_equal(got[0], np.array([[[0.3, 0.2], [0.5, 0.3]]], np.float32)[..., :k])
  plain = router.choose(gates, k, True)
  jax.tree.map(
    np.testing.assert_array_equal, router.choose_biased(gates, np.zeros(3), k, True), plain
  )


def test_zero_bias_is_no_bias(models, biased, make_batch):
  batch = make_batch(4, 8)
  want, want_metrics = once(models['btx'], batch)
  still = dataclasses.replace(LOSS, expert_bias_update_rate=0.0)
  network = transformer.Network(biased, config.Compute())
  params = init(models['btx'])
  ffn = params['blocks']['ffn'] | {'expert_bias': np.zeros((2, 4), np.float32)}
  params = params | {'blocks': params['blocks'] | {'ffn': ffn}}
  assert jax.tree.structure(params) == jax.tree.structure(network.abstract())
  call, state = compiled(biased, batch, loss=still)
  got, metrics = call(state._replace(params=params), RATE)
  assert metrics.loss == want_metrics.loss
  got = flat(got.params)
  assert not got.pop('blocks/ffn/expert_bias').any(), 'neither Adam nor weight decay moves it'
  assert all(near(got[path], array) for path, array in flat(want.params).items())


def test_bias_evens_loads(biased, make_batch):
  batch = make_batch(8, 12, seed=2)
  loss = config.Loss(load_balance=0, router_z=0, expert_bias_update_rate=0.02)
  call, state = compiled(biased, batch, loss=loss)
  ffn = state.params['blocks']['ffn']
  # Gates of nothing but chance, and a push to the first expert that is larger than they differ.
  skewed = ffn | {'expert_bias': np.tile(np.array([0.6, 0, 0, -0.2], np.float32), (2, 1))}
  state = state._replace(params=state.params | {'blocks': state.params['blocks'] | {'ffn': skewed}})
  worst = []
  for _ in range(60):
    state, metrics = call(state, 0.0)
    load = metrics.sums.routing.ffn.load
    worst.append((load / load.sum(-1, keepdims=True)).max())
  assert worst[0] > 0.7 and max(worst[-5:]) < 0.4, worst


def test_bias_is_counted_cut_and_made_by_a_rule(models, biased):
  assert counted(biased) == (
    arithmetic.total_parts(biased), arithmetic.active_parts(biased)
  )  # fmt: skip
  assert arithmetic.total_parts(biased).routers == arithmetic.total_parts(models['btx']).routers + 8
  assert arithmetic.forward_flops(biased, 16) == arithmetic.forward_flops(models['btx'], 16)
  upcycle = config.Upcycle(('a', 'b'), 'bam_kv_experts', num_experts=4, expert_bias=True)
  mixture = rules.mixture_model(models['dense'], upcycle)
  target = transformer.Network(mixture, config.Compute()).abstract()
  made = memory.mix([init(models['dense'])] * 2, models['dense'], upcycle)
  bias = made['blocks']['ffn']['expert_bias']
  assert bias.shape == (2, 4) and bias.dtype == np.float32 and not bias.any()
  sharding.tree(target, sharding.make_mesh(config.Mesh(expert=2)))
  with pytest.raises(UserError, match='expert_bias'):
    config.Upcycle(('a', 'b'), 'average', expert_bias=True)


FACTORS = {'embed': 0.0, 'blocks/attention': 0.5, 'blocks/attention/key': 0.0, 'blocks/*/router': 2}


@pytest.mark.slow
def test_factors_freeze_and_scale(models, make_batch):
  model, batch = models['bam_kv_experts'], make_batch(4, 8)
  before = flat(init(model))
  plain = flat(once(model, batch)[0].params)
  staged = stages.Stages(tuple(FACTORS.items()))
  after, metrics = once(model, batch, staged=staged)
  for path, array in flat(after.params).items():
    factor = stages.factor(path, staged.factors)
    if not factor:
      np.testing.assert_array_equal(array, before[path], err_msg=path)
    else:
      want = factor * (plain[path] - before[path])
      np.testing.assert_allclose(array - before[path], want, atol=1e-6, err_msg=path)
      assert np.abs(want).max() > 1e-5, path
  frozen = [x for path, x in _moments(after.opt_state) if path == 'embed/table']
  assert frozen and not any(np.any(x) for x in frozen), 'what is frozen counts in no norm either'
  assert metrics.gradient_norm < once(model, batch)[1].gradient_norm


def _moments(opt_state):
  leaves = jax.tree_util.tree_leaves_with_path(opt_state)
  return [(sharding.path_of(path), leaf) for path, leaf in leaves]


def test_the_longest_match_wins():
  factors = (('blocks', 0.1), ('blocks/*/key', 0.3), ('blocks/ffn', 0.2))
  want = {
    'embed/table': 1.0, 'blocks/norm/scale': 0.1, 'blocks/ffn/up': 0.2, 'blocks/attention/key': 0.3,
    'blocks/attention/key_scale': 0.1, 'blocks2/up': 1.0,
  }  # fmt: skip
  assert {path: stages.factor(path, factors) for path in want} == want
  assert {path: stages.factor(path, factors[::-1]) for path in want} == want


def test_routers_learn_first(biased, make_batch):
  rates = stages.rates(lambda n: RATE * (n + 1), 2)
  assert [rates(n) for n in range(3)] == [
    (RATE, 0.0), (2 * RATE, 0.0), (pytest.approx(3 * RATE), pytest.approx(3 * RATE))
  ]  # fmt: skip
  staged = stages.Stages(router_warmup=True)
  call, state = compiled(biased, make_batch(4, 8), staged=staged, rate=rates(0))
  before = flat(state.params)
  state, _ = call(state, rates(0))
  state, _ = call(state, rates(1))
  for path, array in flat(state.params).items():
    moved = not np.array_equal(array, before[path])
    assert moved == (path.split('/')[-1] in ('router', 'expert_bias')), path
  state, _ = call(state, rates(2))
  assert all(not np.array_equal(x, before[path]) for path, x in flat(state.params).items())


def _resolved(recipe_dict, run, **changes):
  recipe_dict['runs'][run].update(changes)
  return graph.resolve(config.parse(recipe_dict))


def test_stages_of_a_recipe(recipe_dict):
  factors = {'blocks/ffn': 0.5}
  nodes = _resolved(recipe_dict, 'bam', router_warmup_steps=2, learning_rate_factors=factors)
  assert stages.of(nodes['bam'].run) == stages.Stages((('blocks/ffn', 0.5),), True)
  assert stages.of(nodes['btx'].run) == stages.Stages()
  assert hash(stages.of(nodes['bam'].run))
  recipe_dict['steps'] = 2
  assert config.parse(recipe_dict).router_warmup_steps('bam') == 1


@pytest.mark.parametrize(
  'run, changes, words',
  [
    ('seed', dict(router_warmup_steps=1), ['runs.seed.router_warmup_steps=1', 'dense']),
    ('bam', dict(router_warmup_steps=6), ['runs.bam.router_warmup_steps=6', '6 steps']),
    ('bam', dict(router_warmup_steps=-1), ['runs.bam', 'router_warmup_steps=-1']),
    (
      'btx',
      dict(learning_rate_factors={'blocks/attention/router': 0.0}),
      ['runs.btx.learning_rate_factors', "'blocks/attention/router'", 'blocks/ffn/router'],
    ),
    ('seed', dict(learning_rate_factors={'embed': -1}), ["learning_rate_factors['embed']=-1"]),
    ('seed', dict(learning_rate_factors={'embed': float('nan')}), ['learning_rate_factors']),
    ('seed', dict(loss={'expert_bias_update_rate': -0.1}), ['expert_bias_update_rate=-0.1']),
    ('seed', dict(loss={'balance_over': 'batch'}), ['balance_over', "'global_batch'"]),
  ],
  ids=str,
)
def test_mistakes(recipe_dict, run, changes, words):
  with pytest.raises(UserError) as raised:
    _resolved(recipe_dict, run, **changes)
  assert all(word in str(raised.value) for word in words), raised.value
