"""What a person sees while a recipe trains: its runs, how far each is, the time left."""

import sys
import time
from collections.abc import Mapping
from typing import Self

import rich.progress
from absl import logging
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # between two lines of a run where there is no terminal to redraw


class Progress:
  """A bar for each run on a terminal, or a line now and then where there is none (a log).

  A context manager. It writes to standard error, so that standard output stays for results, and
  does nothing unless `enabled`, as for all processes but one. `runs` has the steps of each run.
  """

  def __init__(self, runs: Mapping[str, int], enabled: bool, console: Console | None = None):
    self._console, self._enabled = console or Console(stderr=True), enabled
    self._next_line, self._running = 0.0, ''
    self._bars = rich.progress.Progress(
      TextColumn('{task.description}'),
      BarColumn(24),
      TextColumn('{task.completed:,} of {task.total:,}  {task.fields[facts]}'),
      TimeElapsedColumn(),
      TimeRemainingColumn(),
      console=self._console,
      disable=not (enabled and self._console.is_terminal),
    )
    self._tasks = {
      name: self._bars.add_task(name, start=False, total=total, facts='', visible=False)
      for name, total in runs.items()
    }

  def __enter__(self) -> Self:
    self._bars.start()
    # A log line straight to the terminal would break the bars; this stream prints above them.
    logging.get_absl_handler().python_handler.setStream(sys.stderr)
    return self

  def __exit__(self, *error) -> None:
    if self._running:
      task = self._task(self._running)
      self._line(f'{self._running}: stopped at step {task.completed:,} of {task.total:,}')
    self._bars.stop()
    logging.get_absl_handler().python_handler.setStream(sys.stderr)

  def start(self, run: str, step: int) -> None:
    """`run` begins, or resumes when `step` is not 0."""
    self._bars.reset(self._tasks[run], completed=step, visible=True)
    self._running, self._next_line = run, time.monotonic() + PLAIN_SECONDS
    how = f'resumes at step {step:,} of' if step else 'starts,'
    self._line(f'{run}: {how} {self._task(run).total:,} steps')

  def update(self, run: str, step: int, loss: float, speed: float, goodput: float) -> None:
    """`run` has done `step` steps; speed in tokens/s, goodput the share of its time in steps."""
    facts = f'loss {loss:.4f}, {speed:,.0f} tokens/s, goodput {goodput:.0%}'
    self._bars.update(self._tasks[run], completed=step, facts=facts)
    if time.monotonic() >= self._next_line:
      self._next_line = time.monotonic() + PLAIN_SECONDS
      task = self._task(run)
      left = '' if task.time_remaining is None else f', {duration(task.time_remaining)} left'
      self._line(f'{run}: step {step:,} of {task.total:,}, {facts}{left}')

  def note(self, text: str) -> None:
    """Prints a line above the bars."""
    if self._enabled:
      self._console.print(text, soft_wrap=True, highlight=False, markup=False)

  def finish(self, run: str, loss: float | None) -> None:
    """`run` is done; `loss` is of its last step, None where no step was left to do."""
    self._running = ''
    self._bars.stop_task(self._tasks[run])
    how = '' if loss is None else f'loss {loss:.4f}, '
    self._line(f'{run}: done, {how}{duration(self._task(run).elapsed or 0)}')

  def skip(self, run: str) -> None:
    """`run` was finished before."""
    self.note(f'{run}: skipped, it is finished')

  def _task(self, run: str) -> rich.progress.Task:
    return self._bars.tasks[self._tasks[run]]

  def _line(self, text: str) -> None:
    if self._bars.disable:  # a bar says it
      self.note(text)


def duration(seconds: float) -> str:
  """A span of time for a person: 42s, 3m 05s, 1h 02m."""
  whole = round(seconds)
  if whole < 60:
    return f'{whole}s'
  if whole < 3600:
    return f'{whole // 60}m {whole % 60:02}s'
  return f'{whole // 3600}h {whole % 3600 // 60:02}m'
