"""Where a run's wall time goes, over all of its attempts: into its steps, or elsewhere."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# step: training; data: waiting for a batch; compile: of the train step; checkpoint: the training
# waits for one, writing goes on beside it; evaluate: held-out losses; restart: what comes before
# the first step of an attempt, and steps that are done again.
KINDS = ('step', 'data', 'compile', 'checkpoint', 'evaluate', 'restart')


class Goodput:
  """A run's seconds by kind; what is spent under no kind is `restart`.

  Args:
    began: when this attempt began, by `clock`.
    clock: the time in seconds.
  """

  def __init__(self, began: float, clock: Callable[[], float] = time.monotonic):
    self._spent, self._clock = dict.fromkeys(KINDS, 0.0), clock
    self._kind, self._since = 'restart', began
    self._began, self._compiled = began, 0.0

  @contextlib.contextmanager
  def spend(self, kind: str) -> Iterator[None]:
    """What passes inside is of this kind; inside of that, another kind may be spent."""
    outer = self._kind
    self._turn(kind)
    try:
      yield
    finally:
      self._turn(outer)

  def resume(self, spent: Mapping[str, float], dropped: Iterable[Mapping[str, Any]]) -> None:
    """Counts the attempts before this one.

    Args:
      spent: by kind, when the checkpoint was made that this attempt begins at.
      dropped: lines of metrics of the steps after it; `seconds` in them have come to nothing.
    """
    for kind, seconds in spent.items():
      self._spent[kind] += seconds
    latest = max((line.get('seconds', 0.0) for line in dropped), default=0.0)
    self._spent['restart'] += max(latest - sum(spent.values()), 0.0)
    self._compiled += spent.get('compile', 0.0)

  @property
  def kind(self) -> str:
    """What is being spent now."""
    return self._kind

  @property
  def attempt(self) -> tuple[float, float]:
    """Seconds of this attempt, and those of them that went into compiling."""
    return self._clock() - self._began, self.spent()['compile'] - self._compiled

  @property
  def seconds(self) -> float:
    """Wall time over all attempts."""
    return sum(self.spent().values())

  def spent(self) -> dict[str, float]:
    """Seconds by kind, up to now."""
    self._turn(self._kind)
    return dict(self._spent)

  def shares(self) -> dict[str, float]:
    """Shares of the wall time by kind; that of `step` is the goodput."""
    spent = self.spent()
    return {kind: seconds / sum(spent.values()) for kind, seconds in spent.items()}

  def _turn(self, kind: str) -> None:
    now = self._clock()
    self._spent[self._kind] += now - self._since
    self._kind, self._since = kind, now


def process_began() -> float:
  """When this process began, by `time.monotonic`; on systems without /proc, now."""
  try:
    # Field 22 of a line whose second field, a name in brackets, may hold spaces.
    ticks = int(Path('/proc/self/stat').read_text().rpartition(')')[2].split()[19])
  except OSError:
    return time.monotonic()
  began = ticks / os.sysconf('SC_CLK_TCK')
  return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - began)
