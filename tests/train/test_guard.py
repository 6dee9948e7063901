"""A step that would do harm leaves no trace; and when a run halts."""

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
    state = step.State(params, opt_state)
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


NAN = {'loss': math.nan, 'gradient_norm': 1.0}
INFINITE = {'loss': 9.0, 'gradient_norm': math.inf}
GOOD = {'loss': 1.0, 'gradient_norm': 1.0}


def taken(skips: guard.Skips, step: int, facts: dict) -> bool:
  skips(step, facts := dict(facts))
  return facts['taken']


def test_when_a_run_halts():
  skips = guard.Skips('seed', config.Guard(), lambda: None)
  assert taken(skips, 1, GOOD)
  with pytest.raises(UserError, match='NaN or infinity at step 2, .*; no checkpoint was saved'):
    skips(2, dict(NAN))


def test_too_many_in_a_row_halt_a_run_and_a_resume_counts_on():
  how = config.Guard(on_nan='skip', max_skipped=3)
  skips = guard.Skips('seed', how, lambda: None)
  found = [taken(skips, at, facts) for at, facts in enumerate([NAN, INFINITE, GOOD, NAN, NAN])]
  assert found == [False, False, True, False, False] and skips.counts == (4, 2)
  again = guard.Skips('seed', how, lambda: None, list(skips.counts))  # as JSON gives it back
  assert not taken(again, 5, NAN)
  with pytest.raises(
    UserError, match='would skip step 6 after 3 others in a row .guard.max_skipped=3.'
  ):
    again(6, dict(INFINITE))
