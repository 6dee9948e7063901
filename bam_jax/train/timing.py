"""Where a run's wall time goes, over all of its attempts."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

# 'data' waits for a batch, 'checkpoint' for one to be written; 'restart' is what comes before the
# first step, and steps that are done again.
KINDS = ('step', 'data', 'compile', 'checkpoint', 'evaluate', 'restart')


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
