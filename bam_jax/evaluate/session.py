"""A comparison as its reader at a terminal sees it: progress, tables, notes, and a page."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.progress
import rich.table

from bam_jax import cli, config
from bam_jax.errors import UserError
from bam_jax.evaluate import comparison, corpus, page, routing
from bam_jax.reports import scores


def run(
  checkpoints: Sequence[str],
  domains: Sequence[corpus.Domain],
  options: comparison.Options,
  folder: str | None = None,
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
    with _routing_errors(folder):
      Path(folder).mkdir(parents=True, exist_ok=True)
  with _progress() as progress:
    results = [
      comparison.score(entry, domains, options, folder is not None, progress) for entry in entries
    ]
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
  console = cli.console()
  for table in tables(facts):
    console.print(table, '')
  for note in facts['notes']:
    console.print(note, soft_wrap=True)
  if folder is not None:
    with _routing_errors(folder):
      facts['routing_page'] = str(page.write(Path(folder), facts, results, domains))
    console.print(f'Open {facts["routing_page"]} in a browser.', soft_wrap=True)
  return facts


def tables(facts: Mapping[str, Any]) -> list[rich.table.Table]:
  """Perplexity, bits per byte, and the difference from the first checkpoint, by domain.

  Args:
    facts: of `--json`.
  """
  share, rows, domains = f'{100 * facts["confidence"]:g}%', facts['rows'], facts['domains']
  made = [
    _table(f'Perplexity, and its {share} interval', domains, rows, _perplexity),
    _table(f'Bits per byte, and its {share} interval', domains, rows, _bits),
  ]
  if len(rows) > 1:
    title = f'Bits per byte less those of {rows[0]["label"]}; *: the {share} interval is without 0'
    made.append(_table(title, domains, rows[1:], difference))
  shares = [
    (row['label'], router, *(routing.own_share(by_domain[name]) for name in domains))
    for row in rows
    for router, by_domain in (row['routing'] or {}).items()
  ]
  if shares:
    title = "Tokens with their domain's expert"
    made.append(cli.table(title, ['checkpoint', 'router'], domains, shares))
  return made


def difference(score: Mapping[str, Any]) -> str:
  """A cell of the table of differences."""
  measure = score['difference']['bits_per_byte']
  low, high = measure['low'], measure['high']
  certain = low is not None and (low > 0 or high < 0)
  return _cell(measure, '{:+.4f}'.format, '*' if certain else '')


def _table(
  title: str,
  domains: Sequence[str],
  rows: Sequence[Mapping[str, Any]],
  cell: Callable[[Mapping[str, Any]], str],
) -> rich.table.Table:
  lines = [
    (row['label'], *(cell(row['domains'][name]) for name in domains), cell(row['overall']))
    for row in rows
  ]
  return cli.table(title, ['checkpoint'], [*domains, 'overall'], lines)


def _perplexity(score: Mapping[str, Any]) -> str:
  return _cell(score['perplexity'], scores.number)


def _bits(score: Mapping[str, Any]) -> str:
  return _cell(score['bits_per_byte'], '{:.4f}'.format)


def _cell(measure: Mapping[str, Any], text: Callable[[float], str], mark: str = '') -> str:
  value = text(measure['value']) + mark
  if measure['low'] is None:
    return value
  return f'{value}\n{text(measure["low"])} … {text(measure["high"])}'


@contextlib.contextmanager
def _progress() -> Iterator[comparison.Progress]:
  """A bar at a terminal."""
  columns = (
    rich.progress.TextColumn('{task.description}', markup=False),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeRemainingColumn(),
  )
  console = cli.console()
  disable = not console.is_terminal
  with rich.progress.Progress(*columns, console=console, transient=True, disable=disable) as bar:
    task = bar.add_task('', total=None)

    def begin(what: str, windows: int):
      bar.reset(task, description=what, total=windows)
      return lambda more: bar.advance(task, more)

    yield begin


@contextlib.contextmanager
def _routing_errors(folder: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(f'--routing={folder} cannot be written: {error.strerror}.') from error
