"""What happens every so many steps of a run."""

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
  """Calls hooks in the order in which they were added.

  A hook of `add` is called with the state after a step that was dispatched; the devices may still
  be at work on it. A hook of `add_finished` is called with the metrics of a step, as plain numbers
  that are read after the next step was dispatched, so that no device waits for the host.
  """

  def __init__(self):
    self._hooks, self._finished_hooks = [], []
    self._pending: tuple[int, step_lib.StepMetrics] | None = None

  def add(self, hook: Callable[[int, step_lib.State], None], every: int = 1) -> None:
    """Has a hook called after every so many steps; 0 is never."""
    if every:
      self._hooks.append((hook, every))

  def add_finished(self, hook: Callable[[int, dict[str, Any]], None]) -> None:
    """Has a hook called with the metrics of every step."""
    self._finished_hooks.append(hook)

  def dispatched(self, step: int, metrics: step_lib.StepMetrics) -> None:
    """A step was dispatched: calls the hooks of finished steps for the one before."""
    self.settle()
    self._pending = step, metrics

  def settle(self) -> None:
    """Waits for the step under way, if any, and calls the hooks of finished steps for it."""
    if self._pending:
      (step, metrics), self._pending = self._pending, None
      facts = log.of_step(metrics)
      for hook in self._finished_hooks:
        hook(step, facts)

  def run(self, step: int, state: step_lib.State) -> None:
    """Calls the hooks that are due after a step."""
    for hook, every in self._hooks:
      if step % every == 0:
        hook(step, state)


class Profile:
  """Records the steps that were asked for with `jax.profiler`, in the job's first process.

  `settle` waits for the step under way; `first_step` are done before this attempt.
  """

  def __init__(self, folder: Path, watch: config.Watch, first_step: int, settle: Callable):
    first = watch.profile_from if jax.process_index() == 0 else 0
    self._begin, self._end = (first - 1, first + watch.profile_steps - 1) if first else (-1, -1)
    self._folder, self._settle = folder, settle
    self._recording = contextlib.ExitStack()
    self(first_step)

  def __call__(self, step: int, state: step_lib.State | None = None) -> None:
    if step == self._begin:
      self._settle()
      folder = self._recording.enter_context(buckets.drafts(self._folder))
      self._recording.enter_context(jax.profiler.trace(folder))
    if step == self._end:
      self._settle()
      self.close()

  def close(self) -> None:
    """Writes what was recorded, if anything was."""
    self._recording.close()
