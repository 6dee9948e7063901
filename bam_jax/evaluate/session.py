"""A comparison as its reader at a terminal sees it: progress, tables, notes, and a page."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.progress

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.evaluate import comparison, corpus, page, routing, tables


def run(
  checkpoints: Sequence[str],
  domains: Sequence[corpus.Domain],
  options: comparison.Options,
  folder: str | None,
) -> dict[str, Any]:
  """Compares checkpoints, prints what came out, and returns the facts of `--json`.

  Args:
    checkpoints: at least one.
    domains: what to score.
    options: how.
    folder: where the pictures and the page of the routers go, if they are wanted.

  Raises:
    UserError: a checkpoint cannot be compared, or the folder cannot be written.
  """
  entries = comparison.enter(checkpoints, domains, options)
  if folder is not None:
    if not any(routing.expert_names(entry.meta) for entry in entries):
      raise UserError('--routing shows routers, and no checkpoint has one: leave it out.')
    _make(Path(folder))
  console = rich.console.Console(stderr=True, markup=False, highlight=False)
  with _progress(console) as progress:
    results = [comparison.score(entry, domains, options, progress) for entry in entries]
  facts = {
    'dtype': options.dtype,
    'mesh': config.to_dict(options.mesh),
    'confidence': options.confidence,
    'resamples': options.resamples,
    'seed': options.seed,
    'domains': [domain.name for domain in domains],
    'notes': comparison.notes(entries),
    'rows': comparison.compare(results, domains, options),
    'routing_page': None,
  }
  if not console.is_terminal:
    console.width = max(console.width, 120)
  for table in tables.tables(facts):
    console.print(table, '')
  for note in facts['notes']:
    console.print(note, soft_wrap=True)
  if folder is not None:
    facts['routing_page'] = str(_written(Path(folder), facts, results, domains))
    console.print(f'Open {facts["routing_page"]} in a browser.', soft_wrap=True)
  return facts


@contextlib.contextmanager
def _progress(console: rich.console.Console) -> Iterator[comparison.Progress]:
  columns = (
    rich.progress.TextColumn('{task.description}', markup=False),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeRemainingColumn(),
  )
  with rich.progress.Progress(
    *columns, console=console, transient=True, disable=not console.is_terminal
  ) as bar:
    task = bar.add_task('', total=None)

    def begin(what: str, windows: int):
      bar.reset(task, description=what, total=windows)
      return lambda more: bar.advance(task, more)

    yield begin


def _make(folder: Path) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'--routing={folder} cannot be made: {error.strerror}.') from error


def _written(folder: Path, facts, results, domains) -> Path:
  try:
    return page.write(folder, facts, results, domains)
  except OSError as error:
    raise UserError(f'--routing={folder} cannot be written: {error.strerror}.') from error
