"""A thread that says so when a step does not finish, and what the run waits for."""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Self

USUAL = 10  # times the usual step is a stall, if it is also as long as was asked
REMEMBERED = 100  # steps that say what is usual
LOOKS = 20  # in the time of a stall
LEAST, MOST = 0.01, 3600.0  # seconds between two looks

WAITS = {
  'step': 'the devices',
  'data': 'a batch of data',
  'compile': 'the compiler',
  'checkpoint': 'a checkpoint to be written',
  'evaluate': 'the held-out losses',
  'restart': 'what comes before the first step',
}


class Watch:
  """Looks at a run's steps; a context manager, and off the training's path.

  Args:
    name: of the run.
    first_step: steps done before this attempt.
    seconds: without a step or a held-out batch, and at least USUAL times the median step, until a
      line says so; 0 is never.
    kind: what the run is doing, one of WAITS.
    tell: prints a line.
  """

  def __init__(
    self,
    name: str,
    first_step: int,
    seconds: float,
    kind: Callable[[], str],
    tell: Callable[[str], None],
  ):
    self._name, self._seconds, self._kind, self._tell = name, seconds, kind, tell
    self._first = self._step = first_step
    self._since = time.monotonic()
    self._took: deque[float] = deque(maxlen=REMEMBERED)
    self._told = False
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._look, name='watch', daemon=True)

  def __enter__(self) -> Self:
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *error) -> None:
    self._ended.set()
    if self._seconds:
      self._thread.join()

  def done(self, step: int) -> None:
    """A step has finished."""
    now = time.monotonic()
    if self._told:
      self._tell(f'{self._name}: goes on, step {step:,} took {now - self._since:.0f} s')
    elif self._step > self._first:  # the first one compiles
      self._took.append(now - self._since)
    self._step, self._since, self._told = step, now, False

  def goes_on(self) -> None:
    """What the run waits for between two steps has done a part."""
    self._since = time.monotonic()
    if self._told:
      self._told = False
      self._tell(f'{self._name}: goes on')

  def _look(self) -> None:
    while not self._ended.wait(min(max(self._seconds / LOOKS, LEAST), MOST)):
      waited = time.monotonic() - self._since
      usual = statistics.median(list(self._took)) if self._took else 0.0
      if not self._told and waited > max(self._seconds, USUAL * usual):
        self._told = True
        self._tell(
          f'{self._name}: stalled, no step has finished for {waited:.0f} s after step '
          f'{self._step:,}; it waits for {WAITS[self._kind()]}'
        )
