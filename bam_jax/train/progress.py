"""What a person sees while a recipe trains: its runs, the one that is under way, the time left."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from absl import logging
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 10.0  # between two lines of a run where there is no terminal to redraw
STYLES = {
  'waiting': 'dim',
  'running': 'bold cyan',
  'done': 'green',
  'skipped': 'dim green',
  'stopped': 'red',
}


@dataclasses.dataclass
class _Run:
  total: int
  state: str = 'waiting'
  step: int = 0
  loss: float | None = None
  tokens_per_second: float | None = None
  started: float = 0.0
  seconds: float = 0.0
  first: tuple[int, float] | None = None  # step and time of the first update: compiling is over
  last: tuple[int, float] | None = None

  @property
  def pace(self) -> tuple[int, float]:
    """Steps, and the seconds that they took."""
    if self.first is None or self.last is None:
      return 0, 0.0
    return self.last[0] - self.first[0], self.last[1] - self.first[1]


class Progress:
  """A live table of runs on a terminal, or a line now and then where there is none (a log).

  A context manager. It writes to standard error, so that standard output stays for results.

  Args:
    runs: the total steps of each run, in the order of training.
    enabled: False makes every call do nothing, for all processes but one.
    console: where to write; None is standard error.
    clock: the time in seconds.
  """

  def __init__(
    self,
    runs: Mapping[str, int],
    enabled: bool,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._runs = {name: _Run(total) for name, total in runs.items()}
    self._enabled = enabled
    self._console = console or Console(stderr=True)
    self._clock = clock
    self._live = None
    self._next_line = 0.0
    if enabled and self._console.is_terminal:
      self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)

  def __enter__(self) -> Self:
    if self._live:
      self._live.start()
      # A log line straight to the terminal would break the table; this stream prints above it.
      logging.get_absl_handler().python_handler.setStream(sys.stderr)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    for name, run in self._runs.items():
      if run.state == 'running':
        run.state, run.seconds = 'stopped', self._clock() - run.started
        self._line(f'{name}: stopped at step {run.step:,} of {run.total:,}')
    if self._live:
      self._live.stop()
      logging.get_absl_handler().python_handler.setStream(sys.stderr)

  def start(self, run: str, step: int) -> None:
    """`run` begins, or resumes when `step` is not 0."""
    this = self._runs[run]
    this.state, this.step, this.started = 'running', step, self._clock()
    self._next_line = this.started + PLAIN_SECONDS
    if step:
      self._line(f'{run}: resumes at step {step:,} of {this.total:,}')
    else:
      self._line(f'{run}: starts, {this.total:,} steps')

  def update(
    self, run: str, step: int, loss: float, tokens_per_second: float, goodput: float
  ) -> None:
    """`run` has done `step` steps; `goodput` is the share of its time that went into steps."""
    this, now = self._runs[run], self._clock()
    this.step, this.loss, this.tokens_per_second = step, loss, tokens_per_second
    this.last = (step, now)
    this.first = this.first or this.last
    if now >= self._next_line:
      self._next_line = now + PLAIN_SECONDS
      left = self._run_left(this)
      self._line(
        f'{run}: step {step:,} of {this.total:,}, loss {loss:.4f},'
        f' {tokens_per_second:,.0f} tokens/s, goodput {goodput:.0%}'
        + ('' if left is None else f', {duration(left)} left')
      )

  def note(self, text: str) -> None:
    """Prints a line above the table."""
    if self._enabled:
      self._console.print(text, soft_wrap=True, highlight=False, markup=False)

  def finish(self, run: str, loss: float | None) -> None:
    """`run` is done; `loss` is of its last step, None where no step was left to do."""
    this = self._runs[run]
    this.state, this.step, this.loss = 'done', this.total, loss
    this.seconds = self._clock() - this.started
    left = self._recipe_left()
    told = '' if loss is None else f'loss {loss:.4f}, '
    self._line(
      f'{run}: done, {told}{duration(this.seconds)}'
      + (f'; about {duration(left)} left for the recipe' if left else '')
    )

  def skip(self, run: str) -> None:
    """`run` was finished before."""
    self._runs[run].state = 'skipped'
    self._line(f'{run}: skipped, it is finished')

  def _line(self, text: str) -> None:
    if not self._live:
      self.note(text)

  def _run_left(self, run: _Run) -> float | None:
    steps, seconds = run.pace
    return (run.total - run.step) * seconds / steps if steps else None

  def _recipe_left(self) -> float | None:
    """Seconds for what is running and waiting; a run not yet timed goes at the others' pace."""
    paces = [run.pace for run in self._runs.values()]
    steps, seconds = (sum(column) for column in zip(*paces)) if paces else (0, 0.0)
    if not steps:
      return None
    total = 0.0
    for run in self._runs.values():
      if run.state in ('waiting', 'running'):
        own = self._run_left(run)
        total += (run.total - run.step) * seconds / steps if own is None else own
    return total

  def _render(self) -> Group:
    table = Table(box=None, pad_edge=False, header_style='dim')
    table.add_column('run', no_wrap=True)
    table.add_column('state', width=7)
    table.add_column('', width=24)
    for name in ('step', 'loss', 'tokens/s', 'time', 'left'):
      table.add_column(name, justify='right', no_wrap=True)
    for name, run in self._runs.items():
      table.add_row(*self._cells(name, run), style='dim' if run.state == 'waiting' else '')
    finished = sum(run.state in ('done', 'skipped') for run in self._runs.values())
    left = self._recipe_left()
    summary = f'{finished} of {len(self._runs)} runs finished'
    summary += f', about {duration(left)} left' if left else ''
    return Group(table, Text(summary, style='dim'))

  def _cells(self, name: str, run: _Run) -> tuple:
    active = run.state == 'running'
    seconds = self._clock() - run.started if active else run.seconds
    left = self._run_left(run) if active else None
    fraction = run.total if run.state == 'skipped' else run.step
    bar = ProgressBar(total=max(run.total, 1), completed=fraction, width=24)
    return (
      name,
      Text(run.state, style=STYLES[run.state]),
      '' if run.state in ('waiting', 'skipped') else bar,
      f'{run.step:,}/{run.total:,}' if active or run.state == 'stopped' else f'{run.total:,}',
      '' if run.loss is None else f'{run.loss:.4f}',
      '' if run.tokens_per_second is None else f'{run.tokens_per_second:,.0f}',
      duration(seconds) if seconds else '',
      '' if left is None else duration(left),
    )


def duration(seconds: float) -> str:
  """A span of time for a person: 42s, 3m 05s, 1h 02m."""
  whole = round(seconds)
  if whole < 60:
    return f'{whole}s'
  if whole < 3600:
    return f'{whole // 60}m {whole % 60:02}s'
  return f'{whole // 3600}h {whole % 3600 // 60:02}m'
