"""Where a run's wall time goes, over all of its attempts; a thread that reports stalled steps."""

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

KINDS = {  # of time, and what a run waits for while it is spent
  'step': 'the devices',
  'data': 'a batch of data',
  'compile': 'the compiler',
  'checkpoint': 'a checkpoint to be written',
  'evaluate': 'the held-out losses',
  'restart': 'what comes before the first step',  # and steps that are done again
}
USUAL = 10  # times the median step, and as long as was asked, is a stall


class Goodput:
  """A run's seconds by kind; what is spent on no kind, from when it `began`, is `restart`."""

  def __init__(self, began: float, clock: Callable[[], float] = time.monotonic):
    self._spent, self._clock = dict.fromkeys(KINDS, 0.0), clock
    self._began, self._since, self._compiled = began, began, 0.0
    self.kind = 'restart'  # what time is being spent on now

  @contextlib.contextmanager
  def spend(self, kind: str) -> Iterator[None]:
    """Counts the block's time as of this kind, but for blocks of another kind inside it."""
    outer = self.kind
    self._switch(kind)
    try:
      yield
    finally:
      self._switch(outer)

  def resume(self, spent: Mapping[str, float], dropped: Iterable[Mapping[str, Any]]) -> None:
    """Adds the attempts before this one.

    They had `spent` this much at the checkpoint that this one begins at; `dropped` are metrics of
    the steps after it, which are done again: their `seconds` came to nothing.
    """
    for kind, seconds in spent.items():
      self._spent[kind] += seconds
    latest = max((line.get('seconds', 0.0) for line in dropped), default=0.0)
    self._spent['restart'] += max(latest - sum(spent.values()), 0.0)
    self._compiled += spent.get('compile', 0.0)

  def attempt(self) -> tuple[float, float]:
    """Seconds of this attempt, and those of them that went into compiling."""
    return self._clock() - self._began, self.spent()['compile'] - self._compiled

  def spent(self) -> dict[str, float]:
    """Seconds by kind over all attempts, up to now."""
    self._switch(self.kind)
    return dict(self._spent)

  def facts(self) -> dict[str, Any]:
    """`seconds` of wall time over all attempts, the share in steps (`goodput`), all shares."""
    spent = self.spent()
    seconds = sum(spent.values())
    shares = {kind: part / seconds for kind, part in spent.items()}
    return {'seconds': seconds, 'goodput': shares['step'], 'time': shares}

  def _switch(self, kind: str) -> None:
    now = self._clock()
    self._spent[self.kind] += now - self._since
    self.kind, self._since = kind, now


class StallWatch:
  """Reports a step that does not finish, once: a context manager, and a hook of finished steps.

  A step is stalled after so many `seconds` (0: never) without a finished step or held-out batch, if
  they are also USUAL times the median step. `goodput` knows what it waits for, `note` prints that.
  """

  def __init__(
    self, name: str, first_step: int, seconds: float, goodput: Goodput, note: Callable[[str], None]
  ):
    self._name, self._seconds, self._goodput, self._note = name, seconds, goodput, note
    self._first, self._step, self._reported = first_step, first_step, False
    self._since, self._took = time.monotonic(), deque(maxlen=100)
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._look, name='stall watch', daemon=True)

  def __enter__(self) -> Self:
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *error) -> None:
    self._ended.set()
    if self._seconds:
      self._thread.join()

  def __call__(self, step: int, facts: Mapping[str, Any] | None = None) -> None:
    """A step has finished."""
    since, stalled = self._since, self._reported
    self.alive()
    if self._step > self._first and not stalled:  # the first one compiles
      self._took.append(self._since - since)
    self._step = step

  def alive(self) -> None:
    """A part of what the run does between two steps is done."""
    self._since, self._reported = time.monotonic(), False

  def _look(self) -> None:
    while not self._ended.wait(min(max(self._seconds / 20, 0.01), 3600)):
      waited = time.monotonic() - self._since
      usual = statistics.median(list(self._took)) if self._took else 0.0
      if not self._reported and waited > max(self._seconds, USUAL * usual):
        self._reported = True
        self._note(
          f'{self._name}: stalled, no step has finished for {waited:.0f} s after step '
          f'{self._step:,}; it is waiting for {KINDS[self._goodput.kind]}'
        )
