"""What happens between the steps of a run: hooks of finished steps, and a profile of some steps."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from bam_jax import config
from bam_jax.files import folders
from bam_jax.train import log
from bam_jax.train import step as step_lib


class Hooks:
  """Calls hooks, in their order, with every step's number and metrics.

  They are read after the next step was dispatched, so that no device waits for the host.
  """

  def __init__(self, *hooks: Callable[[int, dict[str, Any]], None]):
    self._hooks, self._pending = hooks, None

  def dispatched(self, step: int, metrics: step_lib.StepMetrics) -> None:
    """Reads the metrics of the step before, now that this one was dispatched."""
    self.settle()
    self._pending = step, metrics

  def settle(self) -> None:
    """Waits for the step under way, if any."""
    if self._pending:
      (step, metrics), self._pending = self._pending, None
      facts = log.of_step(metrics)
      for hook in self._hooks:
        hook(step, facts)


class Profile(contextlib.ExitStack):
  """Records some steps in the job's first process; `settle` waits for one under way.

  `close` writes what was recorded, if anything was.
  """

  def __init__(self, folder: Path, watch: config.Watch, settle: Callable[[], None]):
    super().__init__()
    self._first = watch.profile_from if jax.process_index() == 0 else 0  # 0: none
    self._end = self._first and self._first + watch.profile_steps
    self._folder, self._settle = folder, settle

  def before(self, step: int) -> None:
    """Starts the recording before its first step, and writes it after its last."""
    if step == self._first:
      self._settle()
      self.enter_context(jax.profiler.trace(self.enter_context(folders.drafts(self._folder))))
    elif step == self._end:
      self._settle()
      self.close()
