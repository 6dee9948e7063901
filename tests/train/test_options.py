"""Options beyond the paper: balance over a step, biases that balance, groups of parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.model import transformer
from bam_jax.parallel import sharding
from bam_jax.recipes import graph
from bam_jax.train import optimizer, step

OPTIMIZER = config.Optimizer(epsilon=1e-2, clip_norm=0, weight_decay=0.1)
LOSS = config.Loss(load_balance=0.3, router_z=0.2)
GLOBAL = dataclasses.replace(LOSS, balance_over='global_batch')
RATES = np.full(2, 0.1, np.float32)
flat = functools.partial(traverse_util.flatten_dict, sep='/')


@pytest.fixture(scope='module')
def biased(models) -> config.Model:
  experts = dataclasses.replace(models['btx'].ffn_experts, expert_bias=True)
  return dataclasses.replace(models['btx'], ffn_experts=experts)


@functools.cache
def init(model: config.Model) -> dict:
  return jax.device_get(
    jax.jit(transformer.Network(model, config.Compute()).init)(jax.random.key(3))
  )


def compiled(model, batch, *, loss=LOSS, grad_accum_steps=1, factors=()):
  """The function state, learning rates -> state, metrics of one step; and a state to start from."""
  mesh = sharding.make_mesh(config.Mesh())
  abstract = step.abstract_state(model, config.Compute(), OPTIMIZER, mesh)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract.opt_state)
  run = step.train_step(model, config.Compute(), loss, OPTIMIZER, grad_accum_steps, mesh, factors)

  def call(state, rates=RATES):
    with jax.set_mesh(mesh):
      # Copies, for the step takes its state's buffers.
      return jax.device_get(run(jax.tree.map(jnp.array, state), batch, rates))

  return call, step.State(init(model), zeros)


def once(model, batch, **options):
  call, state = compiled(model, batch, **options)
  return call(state)


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


def test_expert_bias_update():
  bias_LE = np.linspace(-0.3, 0.2, 6, dtype=np.float32).reshape(2, 3)
  for loads in np.random.default_rng(0).integers(0, 4, (50, 2, 3), np.int32):
    want = [[0.25 * np.sign(sum(layer) - 3 * load) for load in layer] for layer in loads]
    got = optimizer.update_expert_bias(bias_LE, loads, 0.25)
    np.testing.assert_allclose(got, bias_LE + np.array(want), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_biases_balance(biased, make_batch):
  loss = config.Loss(load_balance=0, router_z=0, expert_bias_update_rate=0.02)
  call, state = compiled(biased, make_batch(8, 12, seed=2), loss=loss)
  # Gates of nothing but chance, and a push to the first expert that is larger than they differ.
  skewed = np.tile(np.array([0.6, 0, 0, -0.2], np.float32), (2, 1))
  params = flat(state.params) | {'blocks/ffn/expert_bias': skewed}
  state = state._replace(params=traverse_util.unflatten_dict(params, sep='/'))
  worst = []
  for _ in range(60):
    state, metrics = call(state, 0 * RATES)
    load = metrics.sums.routing.ffn.load
    worst.append((load / load.sum(-1, keepdims=True)).max())
  assert worst[0] > 0.7 and max(worst[-5:]) < 0.4, worst


FACTORS = {'embed': 0.0, 'blocks/attention': 0.5, 'blocks/attention/key': 0.0, 'blocks/*/router': 2}


@pytest.mark.slow
def test_factors_freeze_and_scale(models, make_batch):
  model, batch = models['bam_kv_experts'], make_batch(4, 8)
  before, factors = flat(init(model)), tuple(FACTORS.items())
  plain, plain_metrics = once(model, batch)
  after, metrics = once(model, batch, factors=factors)
  for path, array in flat(after.params).items():
    factor = optimizer.factor(path, factors)
    if not factor:
      np.testing.assert_array_equal(array, before[path], err_msg=path)
    else:
      want = factor * (flat(plain.params)[path] - before[path])
      np.testing.assert_allclose(array - before[path], want, atol=1e-6, err_msg=path)
      assert np.abs(want).max() > 1e-5, path
  moments = jax.tree_util.tree_leaves_with_path(after.opt_state)
  frozen = [x for path, x in moments if sharding.path_of(path) == 'embed/table']
  assert frozen and not any(np.any(x) for x in frozen), 'what is frozen counts in no norm either'
  assert metrics.gradient_norm < plain_metrics.gradient_norm


def test_the_longest_match_wins():
  factors = (('blocks', 0.1), ('blocks/*/key', 0.3), ('blocks/ffn', 0.2))
  want = {
    'embed/table': 1.0, 'blocks/norm/scale': 0.1, 'blocks/ffn/up': 0.2, 'blocks/attention/key': 0.3,
    'blocks/attention/key_scale': 0.1, 'blocks2/up': 1.0,
  }  # fmt: skip
  assert {path: optimizer.factor(path, factors) for path in want} == want
  assert {path: optimizer.factor(path, factors[::-1]) for path in want} == want


def test_freeze_is_a_factor_of_zero(recipe_dict):
  recipe_dict['runs']['seed'] |= dict(freeze=('embed',), learning_rate_factors={'blocks': 0.5})
  run = config.parse(recipe_dict).runs['seed']
  assert optimizer.factors_of(run) == (('blocks', 0.5), ('embed', 0.0))


def test_routers_learn_first(biased, make_batch):
  call, state = compiled(biased, make_batch(4, 8))
  before = flat(state.params)
  state, _ = call(state, RATES * np.float32([1, 0]))
  for path, array in flat(state.params).items():
    moved = not np.array_equal(array, before[path])
    assert moved == (path.split('/')[-1] in ('router', 'expert_bias')), path
  state, _ = call(state)
  assert all(not np.array_equal(x, before[path]) for path, x in flat(state.params).items())


@pytest.mark.parametrize(
  'run, changes, words',
  [
    ('seed', {'router_warmup_steps': 1}, 'runs.seed.router_warmup_steps=1 .* dense'),
    ('bam', {'router_warmup_steps': 6}, 'runs.bam.router_warmup_steps=6 .* 6 steps'),
    ('btx', {'learning_rate_factors': {'blocks/x': 0.0}}, "btx.* 'blocks/x'.* blocks/ffn/router"),
    ('seed', {'freeze': ('embed', 'unembed')}, "seed.freeze .* 'unembed', which matches no param"),
    ('seed', {'learning_rate_factors': {'embed': -1}}, r"learning_rate_factors\['embed'\]=-1"),
    ('seed', {'loss': {'expert_bias_update_rate': -0.1}}, 'expert_bias_update_rate=-0.1'),
    ('seed', {'loss': {'balance_over': 'batch'}}, "balance_over.*'global_batch'"),
  ],
  ids=str,
)
def test_mistakes(recipe_dict, run, changes, words):
  recipe_dict['runs'][run].update(changes)
  with pytest.raises(UserError, match=words):
    graph.resolve(config.parse(recipe_dict))
