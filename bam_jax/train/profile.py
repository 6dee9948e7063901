"""A profile of some of a run's steps, for TensorBoard's profiler or Perfetto."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath

from bam_jax import config
from bam_jax.files import buckets


class Profiler:
  """Records the steps that were asked for, in the job's first process.

  Args:
    folder: to write into.
    watch: says which steps.
    settle: waits for the steps that are under way.
  """

  def __init__(self, folder: Path | epath.Path, watch: config.Watch, settle: Callable[[], None]):
    first = watch.profile_from if jax.process_index() == 0 else 0
    self._folder, self._settle = folder, settle
    self._first, self._last = first, first + watch.profile_steps - 1
    self._recording = contextlib.ExitStack()

  def before(self, step: int) -> None:
    """A step is about to be dispatched."""
    if self._first and step == self._first:
      self._settle()
      folder = self._recording.enter_context(buckets.drafts(self._folder))
      self._recording.enter_context(jax.profiler.trace(folder))

  def after(self, step: int) -> None:
    """A step was dispatched."""
    if self._first and step == self._last:
      self._settle()
      self.close()

  def close(self) -> None:
    """Writes what was recorded, if anything is."""
    self._recording.close()
