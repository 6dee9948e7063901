"""Steps that would do harm: no number, or a spike, in the loss or the gradient's norm.

The device judges a step and leaves the state as it was, without a word to the host, and all devices
judge alike: loss and norm are sums over all of them. The host reads the verdict one step later,
counts, and halts the run where its guard says so.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bam_jax import config
from bam_jax.errors import UserError


class History(NamedTuple):
  """What spikes are measured by: of [loss, gradient norm] over the steps that were taken."""

  mean: jax.Array  # float32 [2]
  variance: jax.Array  # float32 [2]
  count: jax.Array  # int32 []


def history(guard: config.Guard, saved: Mapping[str, Any] | None = None) -> History | tuple[()]:
  """The history to go on from, as NumPy arrays; empty where nothing asks for it.

  Args:
    guard: of the run.
    saved: what `to_json` made of it; None, before the first step.
  """
  if guard.on_spike == 'ignore':
    return ()
  saved = saved or {'mean': [0, 0], 'variance': [0, 0], 'count': 0}
  as_float = lambda name: np.asarray(saved[name], np.float32)
  return History(as_float('mean'), as_float('variance'), np.asarray(saved['count'], np.int32))


def to_json(history: History | tuple[()]) -> dict[str, Any] | None:
  """A history for a checkpoint, without a loss of bits; waits for the step that made it."""
  if history == ():
    return None
  return {name: np.asarray(value).tolist() for name, value in history._asdict().items()}


def judge(guard: config.Guard) -> Callable:
  """The function `(before, after, loss, gradient norm) -> (state, spike)`.

  `state` is `after` with its history brought up to date, or `before`, to the bit, where the step is
  to be skipped; `spike` is whether it was one, None where nothing asks.
  """
  skip_nan = guard.on_nan == 'skip'

  if guard.on_spike == 'ignore':
    if not skip_nan:
      return lambda before, after, loss, norm: (after, None)
    return lambda before, after, loss, norm: (_keep(_finite(loss, norm), after, before), None)

  def run(before, after, loss, norm):
    finite, spike = _finite(loss, norm), is_spike(guard, before.history, loss, norm)
    history = _keep(finite & ~spike, add(guard, before.history, loss, norm), before.history)
    taken = ~spike & finite if skip_nan else ~spike
    return _keep(taken, after, before)._replace(history=history), spike

  return run


def is_spike(guard: config.Guard, history: History, loss: jax.Array, norm: jax.Array) -> jax.Array:
  """Whether loss or norm lie too far above their means; never before a window is full."""
  above = jnp.stack([loss, norm]) - history.mean
  far = (above > guard.spike_deviations * jnp.sqrt(history.variance)).any()
  return far & (history.count >= guard.window) & _finite(loss, norm)


def add(guard: config.Guard, history: History, loss: jax.Array, norm: jax.Array) -> History:
  """The history with one step more.

  Plain mean and variance over the first window, then exponentially weighted ones: D. H. D. West,
  Communications of the ACM 22 (1979), with weights that fall off by 1 - 1 / window.
  """
  count = history.count + 1
  rate = 1 / jnp.minimum(count, guard.window)
  delta = jnp.stack([loss, norm]).astype(jnp.float32) - history.mean
  variance = (1 - rate) * (history.variance + rate * delta**2)
  return History(history.mean + rate * delta, variance, count)


def _finite(loss: jax.Array, norm: jax.Array) -> jax.Array:
  return jnp.isfinite(loss) & jnp.isfinite(norm)


def _keep(taken: jax.Array, after: Any, before: Any) -> Any:
  return jax.tree.map(lambda new, old: jnp.where(taken, new, old), after, before)


class Diverged(UserError):
  """A run halts at a step that would do harm."""

  def __init__(self, name: str, what: str, checkpoint: Path | None):
    kept = f'the last good checkpoint is {checkpoint}' if checkpoint else 'no checkpoint was saved'
    super().__init__(
      f'runs.{name} {what}; {kept}: lower runs.{name}.schedule.peak_learning_rate, look at the '
      f'data, or set runs.{name}.guard.'
    )


class Skips:
  """Counts the steps that a run skips, and halts it.

  Args:
    name: of the run.
    guard: of the run.
    last_good: the newest checkpoint, for the message.
    counts: what `counts` was at the checkpoint that the run resumes at.
  """

  def __init__(
    self,
    name: str,
    guard: config.Guard,
    last_good: Callable[[], Path | None],
    counts: tuple[int, int] = (0, 0),
  ):
    self._name, self._guard, self._last_good = name, guard, last_good
    self.counts = counts  # of skipped steps: all, and those that the newest steps are

  @property
  def total(self) -> int:
    """Steps that were skipped."""
    return self.counts[0]

  def skipped(self, step: int, facts: Mapping[str, Any]) -> bool:
    """Whether a step was skipped.

    Args:
      step: its number.
      facts: its `loss`, its `gradient_norm` and, if it is asked, whether it is a `spike`.

    Raises:
      Diverged: the run must halt.
    """
    finite = math.isfinite(facts['loss']) and math.isfinite(facts['gradient_norm'])
    if finite and not facts.get('spike'):
      self.counts = self.total, 0
      return False
    if (self._guard.on_spike if finite else self._guard.on_nan) == 'halt':
      what = (
        f'has a spike at step {step}, loss {facts["loss"]:.4g}, gradient norm '
        f'{facts["gradient_norm"]:.4g}'
        if finite
        else f'lost its loss or gradient to NaN or infinity at step {step}'
      )
      raise Diverged(self._name, what, self._last_good())
    total, running = self.counts
    if running >= self._guard.max_skipped:
      what = f'skipped guard.max_skipped={running} steps, and must skip step {step} too'
      raise Diverged(self._name, what, self._last_good())
    self.counts = total + 1, running + 1
    return True
