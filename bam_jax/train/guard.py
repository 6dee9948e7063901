"""Steps that would do harm: NaN, infinity or a spike in the loss or in the gradient's norm.

The devices decide whether a step is taken, all alike, as loss and norm are sums over all of them.
The host reads that one step later, counts, and halts the run where its guard says so.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bam_jax import config
from bam_jax.errors import UserError


class History(NamedTuple):
  """What spikes are measured by: [loss, gradient norm] over the steps that were taken."""

  mean: jax.Array  # float32 [2]
  variance: jax.Array  # float32 [2]
  count: jax.Array  # int32 []


def history(guard: config.Guard, saved: Mapping[str, Any] | None = None) -> History | tuple[()]:
  """What `to_json` saved, or a new history, in NumPy arrays; empty where spikes are ignored."""
  if guard.on_spike == 'ignore':
    return ()
  saved = saved or {'mean': [0, 0], 'variance': [0, 0], 'count': 0}
  mean, variance = np.float32(saved['mean']), np.float32(saved['variance'])
  return History(mean, variance, np.int32(saved['count']))


def to_json(history: History | tuple[()]) -> dict[str, Any]:
  """A history for a checkpoint, without a loss of bits; waits for the step that made it."""
  facts = jax.device_get(history)._asdict() if history else {}
  return {name: array.tolist() for name, array in facts.items()}


def select(
  guard: config.Guard, before: Any, after: Any, loss: jax.Array, norm: jax.Array
) -> tuple[Any, jax.Array | None]:
  """The state to go on with, and whether the step was a spike (None where spikes are ignored).

  That is `after`, or to the bit `before` where the step of this loss and gradient norm is skipped.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  if guard.on_spike == 'ignore':
    return (_where(finite, after, before) if guard.on_nan == 'skip' else after), None
  spike = is_spike(guard, before.history, loss, norm)
  history = _where(finite & ~spike, add(guard, before.history, loss, norm), before.history)
  taken = ~spike & finite if guard.on_nan == 'skip' else ~spike
  return _where(taken, after, before)._replace(history=history), spike


def is_spike(guard: config.Guard, history: History, loss: jax.Array, norm: jax.Array) -> jax.Array:
  """Whether loss or norm is too far above its mean; never before a window is full."""
  above = jnp.stack([loss, norm]) - history.mean
  far = (above > guard.spike_deviations * jnp.sqrt(history.variance)).any()
  return far & (history.count >= guard.window) & jnp.isfinite(loss) & jnp.isfinite(norm)


def add(guard: config.Guard, history: History, loss: jax.Array, norm: jax.Array) -> History:
  """The history with one more step: mean and variance over the first window, then weighted ones.

  D. H. D. West, Communications of the ACM 22 (1979), weights falling off by 1 - 1 / window.
  """
  count = history.count + 1
  rate = 1 / jnp.minimum(count, guard.window)
  delta = jnp.stack([loss, norm]).astype(jnp.float32) - history.mean
  variance = (1 - rate) * (history.variance + rate * delta**2)
  return History(history.mean + rate * delta, variance, count)


def _where(condition: jax.Array, true: Any, false: Any) -> Any:
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), true, false)


class Skips:
  """A hook of finished steps that counts those that a run skips, and halts it.

  `counts`, of all skipped steps and of the newest ones in a row, are those of the checkpoint that
  the run resumes at; `last_good` returns the folder of the newest checkpoint, for the message.
  """

  def __init__(
    self, name: str, guard: config.Guard, last_good: Callable, counts: Sequence[int] = (0, 0)
  ):
    self._name, self._guard, self._last_good, self.counts = name, guard, last_good, counts

  def __call__(self, step: int, facts: dict[str, Any]) -> None:
    """Adds `taken` and `skipped`, the number of steps, to a step's facts; UserError to halt."""
    loss, norm, (total, in_a_row) = facts['loss'], facts['gradient_norm'], self.counts
    finite = math.isfinite(loss) and math.isfinite(norm)
    taken = finite and not facts.get('spike')
    self.counts = (total, 0) if taken else (total + 1, in_a_row + 1)
    facts |= {'taken': taken, 'skipped': self.counts[0]}
    if not finite and self._guard.on_nan == 'halt':
      self._halt(f'has NaN or infinity at step {step}, in its loss or gradient')
    if not taken and finite and self._guard.on_spike == 'halt':
      self._halt(f'has a spike at step {step}, loss {loss:.4g}, gradient norm {norm:.4g}')
    if not taken and in_a_row >= self._guard.max_skipped:
      limit = f'guard.max_skipped={self._guard.max_skipped}'
      self._halt(f'would skip step {step} after {in_a_row} others in a row ({limit})')

  def _halt(self, what: str) -> None:
    folder: Path | None = self._last_good()
    kept = f'the last good checkpoint is {folder}' if folder else 'no checkpoint was saved'
    raise UserError(
      f'runs.{self._name} {what}; {kept}: lower runs.{self._name}.schedule.peak_learning_rate, '
      f'check the data, or set runs.{self._name}.guard.'
    )
