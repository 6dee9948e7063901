"""Steps that would do harm: NaN or infinity in the loss or in the gradient's norm.

The devices decide whether a step is taken, all alike, as loss and norm are sums over all of them.
The host reads that one step later, counts, and halts the run where its guard says so.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bam_jax import config
from bam_jax.errors import UserError


def select(guard: config.Guard, before: Any, after: Any, loss: jax.Array, norm: jax.Array) -> Any:
  """The state to go on with: `after` or, to the bit, `before` where this step is skipped."""
  if guard.on_nan != 'skip':
    return after
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  return jax.tree.map(lambda x, y: jnp.where(finite, x, y), after, before)


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
    taken = math.isfinite(loss) and math.isfinite(norm)
    self.counts = (total, 0) if taken else (total + 1, in_a_row + 1)
    facts |= {'taken': taken, 'skipped': self.counts[0]}
    if not taken and self._guard.on_nan == 'halt':
      self._halt(f'has NaN or infinity at step {step}, in its loss or gradient')
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
