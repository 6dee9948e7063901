"""Ctrl-C and SIGTERM: finish the step, save, end; the same command continues."""

import contextlib
import signal
from collections.abc import Iterator

import jax

from bam_jax.parallel import processes


class Stopped(Exception):
  """A job was asked to stop, and what it has to save is saved."""

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.signum = signum


class Flag:
  """Whether a signal to stop has come; a second Ctrl-C interrupts at once."""

  signum: int | None = None
  _asked: jax.Array | None = None

  def __call__(self, signum, frame) -> None:
    if self.signum == signum == signal.SIGINT:
      raise KeyboardInterrupt
    self.signum = signum

  def check(self) -> None:
    """Raises Stopped when this process was asked to stop."""
    if self.signum is not None:
      raise Stopped(self.signum)

  def agreed(self) -> int | None:
    """The signal at which to stop after this step, for all processes the same; all ask every step.

    Several processes asked one another after the step before, so that no device waits for it.
    """
    if jax.process_count() == 1:
      return self.signum
    asked, self._asked = self._asked, processes.highest(self.signum or 0)
    return int(jax.device_get(asked)) or None if asked is not None else None


@contextlib.contextmanager
def catch() -> Iterator[Flag]:
  """Catches the signals inside a `with` block; must run in the main thread."""
  flag = Flag()
  before = {signum: signal.signal(signum, flag) for signum in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield flag
  finally:
    for signum, handler in before.items():
      # None is a handler in C, as a device's library may have: Python cannot put it back.
      signal.signal(signum, signal.SIG_DFL if handler is None else handler)
