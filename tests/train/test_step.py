"""One optimizer step: the same on every mesh, in any number of micro-batches, however computed.

Compiled without XLA's optimisations: compiling is what these tests spend their time on.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.model import transformer
from bam_jax.parallel import sharding
from bam_jax.parallel.collectives import Layout
from bam_jax.train import loss as loss_lib
from bam_jax.train import step

# Adam divides a gradient by its own size, and so makes rounding as large as the learning rate where
# a gradient is nearly nothing. This epsilon leaves an update that is smooth in the gradient.
OPTIMIZER = config.Optimizer(epsilon=1e-2, clip_norm=0.5)
LEARNING_RATES = np.full(2, 0.1, np.float32)
LOSS = config.Loss(load_balance=0.3, router_z=0.2)
Z = config.Loss(load_balance=0, router_z=0.2)
ONE = (1, 1, 1, 1)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope='module')
def start(models):
  """Parameters of each variant, as NumPy arrays."""

  @functools.cache
  def make(variant: str) -> dict:
    network = transformer.Network(models[variant], config.Compute())
    return jax.device_get(jax.jit(network.init)(jax.random.key(3)))

  return make


@pytest.fixture(scope='module')
def run(models, start, make_batch):
  """The function that takes one step: (state, metrics, what state should be, state before)."""

  @functools.cache
  def take(variant: str, shape=ONE, grad_accum_steps=1, loss=LOSS, compute=config.Compute()):  # noqa: B008
    model = models[variant]
    mesh = sharding.make_mesh(config.Mesh(*shape))
    with jax.set_mesh(mesh):
      abstract = step.abstract_state(model, compute, OPTIMIZER, mesh)
      params = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), start(variant), abstract[0])
      opt_state = jax.tree.map(
        lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), abstract.opt_state
      )
      before = step.State(params, opt_state)
      batch = sharding.put_batch(make_batch(8, 12, seed=1), mesh)
      train_step = step.train_step(model, compute, loss, OPTIMIZER, grad_accum_steps, mesh)
      after, metrics = train_step(before, batch, LEARNING_RATES)
    return after, metrics, abstract, before

  return take


def leaves(tree) -> dict[str, np.ndarray]:
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def check_equal(got, want, tolerance=1e-5) -> None:
  """Leaves agree relative to the largest magnitude in each."""
  got, want = leaves(got), leaves(want)
  assert got.keys() == want.keys()
  for name, expected in want.items():
    assert got[name].shape == expected.shape and got[name].dtype == expected.dtype, name
    scale = np.abs(expected).max() or 1
    assert np.abs(got[name] - expected).max() / scale < tolerance, name


def test_the_step_learns(run, start):
  after, metrics, *_ = run('bam_kv_experts')
  assert metrics.gradient_norm > OPTIMIZER.clip_norm, 'or nothing here tests the clipping'
  assert metrics.sums.targets.dtype == np.int32 and metrics.sums.targets < 8 * 12
  assert metrics.sums.routing.ffn.tokens[0] < 8 * 12
  moments, before = leaves(after.opt_state), leaves(start('bam_kv_experts'))
  for name, value in leaves(after.params).items():
    assert np.abs(value - before[name]).max() > 1e-3, name
    assert np.abs(moments[next(k for k in moments if '.mu' in k and k.endswith(name))]).max() > 0


def test_it_counts_more_targets_than_float32_can(models):
  batch = dict.fromkeys(('weights', 'segments'), np.ones(2**24 + 1, np.float32))
  network = transformer.Network(models['dense'], config.Compute())
  assert [*map(int, loss_lib.totals(network, batch))] == 2 * [2**24 + 1]


def test_what_is_reported_is_before_clipping(models, start, run, make_batch):
  network = transformer.Network(models['dense'], config.Compute())
  objective = functools.partial(loss_lib.objective, network, LOSS)
  both = jax.jit(jax.value_and_grad(objective, has_aux=True))
  (value, _), gradient = both(start('dense'), make_batch(8, 12, seed=1))
  norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in leaves(gradient).values()))
  after, metrics, *_ = run('dense')
  assert metrics.loss == pytest.approx(float(value), rel=1e-5)
  assert metrics.gradient_norm == pytest.approx(norm, rel=1e-5)
  assert norm > OPTIMIZER.clip_norm
  # What Adam sees is clipped: its first moment after one step is (1 - b1) of that.
  moments = leaves(after.opt_state)
  for name, leaf in leaves(gradient).items():
    (moment,) = [value for key, value in moments.items() if '.mu' in key and key.endswith(name)]
    want = (1 - OPTIMIZER.b1) * leaf * OPTIMIZER.clip_norm / norm
    np.testing.assert_allclose(moment, want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=name)


# All the meshes for all the variants: tests/model/test_layout.py, which compares gradients.
@pytest.mark.parametrize('variant, shape', [
  ('bam_kv_experts', (1, 2, 4, 1)),
  slow('dense', (1, 2, 2, 2)),
  slow('btx', (2, 2, 2, 1)),
], ids=str)  # fmt: skip
def test_many_devices_are_one_device(run, variant, shape):
  one, one_metrics, *_ = run(variant)
  many, many_metrics, abstract, before = run(variant, shape)
  check_equal(many_metrics, one_metrics)
  check_equal(many, one)
  for leaf, wanted in zip(jax.tree.leaves(many), jax.tree.leaves(abstract), strict=True):
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before)), 'the state is donated'


@pytest.mark.parametrize('variant, shape, grad_accum_steps, loss', [
  ('dense', ONE, 4, LOSS),
  # The balancing loss is of each micro-batch's own loads: without it the sums are exact.
  slow('bam_kv_experts', ONE, 2, Z),
  slow('bam_kv_experts', (1, 2, 2, 2), 2, Z),
])  # fmt: skip
def test_micro_batches_are_the_batch(run, make_batch, variant, shape, grad_accum_steps, loss):
  micro = step.micro_batches(Layout(None), make_batch(8, 12, seed=1), grad_accum_steps)
  targets, tokens = micro['weights'].sum((1, 2)), (micro['segments'] > 0).sum((1, 2))
  assert len({*np.asarray(targets)}) == grad_accum_steps, 'or a mean of means would pass'
  assert np.ptp(targets / tokens) > 0.01, 'or weighting tokens by targets would'
  whole, whole_metrics, *_ = run(variant, loss=loss)
  parts, parts_metrics, *_ = run(variant, shape, grad_accum_steps, loss)
  check_equal(parts_metrics, whole_metrics)
  check_equal(parts, whole)


def test_every_micro_batch_has_all_domains_and_the_same_rows_on_a_mesh():
  """Domains take turns from row to row; a fourth of the batch must not be one of them."""
  rows, split = np.arange(64, dtype=np.int32), functools.partial(step.micro_batches, count=4)
  one = np.asarray(split(Layout(None), {'tokens': rows})['tokens'])
  assert sorted(one.ravel()) == rows.tolist()
  assert all(set(part % 4) == {0, 1, 2, 3} for part in one)
  layout = Layout(sharding.make_mesh(config.Mesh(1, 2, 2, 2)))
  local, specs = lambda rows: split(layout, {'tokens': rows})['tokens'], (sharding.BATCH,)
  spread = layout.spread(local, specs, P(None, *sharding.BATCH))
  np.testing.assert_array_equal(np.sort(jax.jit(spread)(rows)), np.sort(one))


@pytest.mark.parametrize('variant, how', [
  ('dense', dict(unroll=2, remat='matmuls', loss_chunk=7)),
  slow('bam_kv_experts', dict(remat='full')),
  slow('untied', dict(loss_chunk=96)),
], ids=str)  # fmt: skip
def test_how_it_is_computed_changes_nothing(run, variant, how):
  plain, plain_metrics, *_ = run(variant)
  other, other_metrics, *_ = run(variant, compute=config.Compute(**how))
  check_equal(other_metrics, plain_metrics)
  check_equal(other, plain)


@pytest.mark.slow
def test_bfloat16_computes_and_keeps_float32(run):
  exact, exact_metrics, *_ = run('dense')
  state, metrics, *_ = run('dense', compute=config.Compute(dtype='bfloat16'))
  for leaf in jax.tree.leaves((state, metrics)):
    assert leaf.dtype in (np.float32, np.int32) and np.isfinite(leaf).all()
  assert 1e-7 < abs(metrics.loss - exact_metrics.loss) < 0.02 * exact_metrics.loss
  table, want = state.params['embed']['table'], exact.params['embed']['table']
  assert 0 < np.abs(np.asarray(table) - np.asarray(want)).max() < LEARNING_RATES[0]


def test_evaluation_sums_what_training_does(models, start, make_batch, run):
  _, metrics, *_ = run('bam_kv_experts')
  model, params = models['bam_kv_experts'], start('bam_kv_experts')
  ffn = dataclasses.replace(model.ffn_experts, capacity_factor=1.0)
  mesh = sharding.make_mesh(config.Mesh(1, 1, 2, 1))
  with jax.set_mesh(mesh):
    batch = sharding.put_batch(make_batch(8, 12, seed=1), mesh)
    evaluate, tight = (
      step.evaluation_step(one, config.Compute(), mesh)
      for one in (model, dataclasses.replace(model, ffn_experts=ffn))
    )
    sums = evaluate(params, batch)
    alike = batch | {'tokens': 0 * batch['tokens']}  # which all choose the same experts
    check_equal(tight(params, alike), evaluate(params, alike))
  assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(sums)), 'of each device by itself'
  check_equal(jax.tree.map(lambda x: np.asarray(x).sum(0, x.dtype), sums), metrics.sums)
