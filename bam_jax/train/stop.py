"""Ctrl-C and SIGTERM: finish the step, save, leave; the same command goes on."""

import contextlib
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
  """A run was asked to stop and has saved its state."""

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.signum = signum


class Flag:
  """Whether a signal to stop has come; a second Ctrl-C interrupts at once."""

  signum: int | None = None

  def __call__(self, signum, frame) -> None:
    if self.signum == signum == signal.SIGINT:
      raise KeyboardInterrupt
    self.signum = signum


@contextlib.contextmanager
def catch() -> Iterator[Flag]:
  """Catches the signals for the time of a `with` block; must run in the main thread."""
  flag = Flag()
  before = {signum: signal.signal(signum, flag) for signum in SIGNALS}
  try:
    yield flag
  finally:
    for signum, handler in before.items():
      signal.signal(signum, handler)
