"""What happens between the steps of a run: hooks, and a profile of some steps."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from bam_jax import config
from bam_jax.files import buckets
from bam_jax.train import log
from bam_jax.train import step as step_lib


class Hooks:
  """Calls hooks, in their order.

  Those of `finished` get every step's number and metrics, read after the next step was dispatched,
  so that no device waits for the host. Those of `add` get the state, as soon as it is dispatched.
  """

  def __init__(self, *finished: Callable[[int, dict[str, Any]], None]):
    self._finished, self._hooks, self._pending = finished, [], None

  def add(self, hook: Callable[[int, step_lib.State], None], every: int = 1) -> None:
    """Calls a hook after each `every` steps; 0: never."""
    if every:
      self._hooks.append((hook, every))

  def dispatched(self, step: int, metrics: step_lib.StepMetrics) -> None:
    """Reads the metrics of the step before, now that this one was dispatched."""
    self.settle()
    self._pending = step, metrics

  def settle(self) -> None:
    """Waits for the step under way, if any."""
    if self._pending:
      (step, metrics), self._pending = self._pending, None
      facts = log.of_step(metrics)
      for hook in self._finished:
        hook(step, facts)

  def run(self, step: int, state: step_lib.State) -> None:
    """Calls the hooks that are due after a step."""
    for hook, every in self._hooks:
      if step % every == 0:
        hook(step, state)


class Profile:
  """Records some steps in the job's first process; `settle` waits for one under way.

  `end` is the first hook between two steps and `begin` the last, so that what other hooks do is not
  recorded.
  """

  def __init__(self, folder: Path, watch: config.Watch, first_step: int, settle: Callable):
    first = watch.profile_from if jax.process_index() == 0 else 0
    self._begin, self._end = (first - 1, first + watch.profile_steps - 1) if first else (-1, -1)
    self._folder, self._settle, self._recording = folder, settle, contextlib.ExitStack()
    self.begin(first_step)

  def begin(self, step: int, state: step_lib.State | None = None) -> None:
    """A hook that starts the recording, if the next step is its first."""
    if step == self._begin:
      self._settle()
      folder = self._recording.enter_context(buckets.drafts(self._folder))
      self._recording.enter_context(jax.profiler.trace(folder))

  def end(self, step: int, state: step_lib.State) -> None:
    """A hook that writes the recording after its last step."""
    if step == self._end:
      self._settle()
      self.close()

  def close(self) -> None:
    """Writes what was recorded, if anything was."""
    self._recording.close()
