"""A step that would do harm leaves no trace; what a spike is; and when a run halts."""

import math

import jax
import numpy as np
import pytest

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.parallel import sharding
from bam_jax.train import guard, optimizer, step

OPTIMIZER, LOSS = config.Optimizer(), config.Loss()
RATES = np.full(2, 1e-2, np.float32)


def run(model, shape, how: config.Guard, batches, grad_accum_steps=1):
  """States after each batch, on the host, and what the steps said."""
  mesh = sharding.make_mesh(config.Mesh(*shape))
  take = step.train_step(
    model, config.Compute(), LOSS, OPTIMIZER, grad_accum_steps, mesh, guard=how
  )
  abstract = step.abstract_state(model, config.Compute(), OPTIMIZER, mesh)
  rng = np.random.default_rng(0)
  draw = lambda x: jax.device_put((0.1 * rng.normal(size=x.shape)).astype(x.dtype), x.sharding)
  params = jax.tree.map(draw, abstract.params)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
  with jax.set_mesh(mesh):
    opt_state = jax.jit(optimizer.adamw(OPTIMIZER).init, out_shardings=shardings)(params)
    state = step.State(params, opt_state, guard.history(how))
    states, said = [jax.device_get(state)], []
    for batch in batches:
      state, metrics = take(state, sharding.put_batch(batch, mesh), RATES)
      states.append(jax.device_get(state))
      said.append(jax.device_get(metrics))
  return states, said


def same(a, b) -> bool:
  return all(x.tobytes() == y.tobytes() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def poisoned(batch: dict, row: int) -> dict:
  """A batch of which one weight is NaN, as after a flipped bit on the way to the device."""
  weights = batch['weights'].copy()
  weights[row, 0] = np.nan
  return batch | {'weights': weights}


ONE = pytest.param((1, 1, 1, 1), 1, marks=pytest.mark.slow)


@pytest.mark.parametrize('shape, grad_accum_steps', [((1, 2, 2, 1), 2), ONE], ids=str)
def test_a_step_with_nan_is_skipped_to_the_bit(models, make_batch, shape, grad_accum_steps):
  good = [make_batch(8, 12, seed) for seed in (1, 2)]
  how = config.Guard(on_nan='skip')
  model = models['bam_kv_experts']
  states, said = run(model, shape, how, [good[0], poisoned(good[1], 5), good[1]], grad_accum_steps)
  assert not np.isfinite(said[1].loss)
  assert same(states[2], states[1]) and not same(states[1], states[0])
  # As if the bad batch had never been.
  clean, _ = run(model, shape, how, good, grad_accum_steps)
  assert same(states[3], clean[2])


@pytest.mark.slow
def test_a_batch_unlike_the_others_is_a_spike(models, make_batch):
  """The model learns one batch by heart; then come other targets, for once."""
  batch, steps = make_batch(8, 12, 1), 60
  other = batch | {'targets': (batch['targets'] + 7) % 320}
  how = config.Guard(on_spike='skip', window=8)
  states, said = run(models['dense'], (1, 2, 1, 1), how, [batch] * steps + [other, batch])
  assert [at for at, metrics in enumerate(said) if metrics.spike] == [steps]
  assert said[steps].loss > said[steps - 1].loss
  assert same(states[steps + 1], states[steps]), 'the history too'
  assert states[-1].history.count == steps + 1 and not same(states[-1].params, states[-2].params)


def test_a_history_is_what_numpy_says():
  how, rng = config.Guard(on_spike='skip', window=5, spike_deviations=3), np.random.default_rng(0)
  values = rng.normal(size=(40, 2)).astype(np.float32)
  history, weights = guard.history(how), np.zeros(0)
  for count, pair in enumerate(values, 1):
    history = guard.add(how, history, *pair)
    weights = np.full(count, 1 / count) if count <= 5 else np.append(0.8 * weights, 0.2)
    mean = weights @ values[:count]
    np.testing.assert_allclose(history.mean, mean, rtol=1e-4, atol=1e-6)
    variance = weights @ (values[:count] - mean) ** 2
    np.testing.assert_allclose(history.variance, variance, rtol=1e-4, atol=1e-6)
  assert history.count == 40
  assert same(guard.history(how, guard.to_json(history)), history)
  far = history.mean + 3.1 * np.sqrt(history.variance)
  assert guard.is_spike(how, history, far[0], history.mean[1])
  assert guard.is_spike(how, history, history.mean[0], far[1])
  assert not guard.is_spike(how, history, *(history.mean + 2.9 * np.sqrt(history.variance)))
  assert not guard.is_spike(how, history, *(history.mean - 9.0)), 'a better loss is not a spike'
  assert not guard.is_spike(how, history._replace(count=np.int32(4)), *far), 'too early'
  still = history._replace(variance=np.zeros(2, np.float32))
  assert not guard.is_spike(how, still, *history.mean), 'a constant loss is not a spike'


NAN = {'loss': math.nan, 'gradient_norm': 1.0}
SPIKE = {'loss': 9.0, 'gradient_norm': 1.0, 'spike': True}
GOOD = {'loss': 1.0, 'gradient_norm': 1.0, 'spike': False}


def taken(skips: guard.Skips, step: int, facts: dict) -> bool:
  skips(step, facts := dict(facts))
  return facts['taken']


def test_when_a_run_halts():
  skips = guard.Skips('seed', config.Guard(), lambda: None)
  assert taken(skips, 1, GOOD)
  with pytest.raises(UserError, match='NaN or infinity at step 2, .*; no checkpoint was saved'):
    skips(2, dict(NAN))
  with pytest.raises(UserError, match='a spike at step 3, loss 9, gradient norm 1'):
    guard.Skips('seed', config.Guard(on_spike='halt'), lambda: None)(3, dict(SPIKE))


def test_too_many_in_a_row_halt_a_run_and_a_resume_counts_on():
  how = config.Guard(on_nan='skip', on_spike='skip', max_skipped=3)
  skips = guard.Skips('seed', how, lambda: None)
  found = [taken(skips, at, facts) for at, facts in enumerate([NAN, SPIKE, GOOD, NAN, NAN])]
  assert found == [False, False, True, False, False] and skips.counts == (4, 2)
  again = guard.Skips('seed', how, lambda: None, list(skips.counts))  # as JSON gives it back
  assert not taken(again, 5, NAN)
  with pytest.raises(
    UserError, match='would skip step 6 after 3 others in a row .guard.max_skipped=3.'
  ):
    again(6, dict(SPIKE))
