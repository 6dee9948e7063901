"""A comparison as its reader at a terminal sees it: progress, tables, notes, and pictures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.table
from rich import progress

from bam_jax import cli, config
from bam_jax.config.strict import require
from bam_jax.evaluate import comparison, corpus, routing
from bam_jax.files import folders
from bam_jax.reports import scores


def run(
  checkpoints: Sequence[str],
  domains: Sequence[corpus.Domain],
  options: comparison.Options,
  folder: str | None = None,
) -> dict[str, Any]:
  """Compares checkpoints, prints what came out, and returns the facts of `--json`.

  Pictures of the routers go to `folder`, if given. UserError as in `enter`, and when the folder
  cannot be written.
  """
  entries = comparison.enter(checkpoints, domains, options)
  if folder is not None:
    routed = any(routing.expert_names(entry.meta) for entry in entries)
    require(routed, '--routing requires a checkpoint with routers: remove it.')
    with folders.writing(folder):
      Path(folder).mkdir(parents=True, exist_ok=True)
  console = cli.console()
  with progress.Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
    for entry in entries:
      comparison.score(entry, domains, options, folder is not None, bar)
  facts = {
    'mesh': config.to_dict(options.mesh),
    **{key: getattr(options, key) for key in ('dtype', 'confidence', 'resamples', 'seed')},
    'domains': [domain.name for domain in domains],
    'notes': comparison.notes(entries),
    'rows': comparison.compare(entries, domains, options),
  }
  for table in tables(facts):
    console.print(table, '')
  for note in facts['notes']:
    console.print(note, soft_wrap=True)
  if folder is not None:
    with folders.writing(folder):
      routing.draw(Path(folder), facts['rows'])
    console.print(f'Pictures of the routers are in {folder}.', soft_wrap=True)
  return facts


def tables(facts: Mapping[str, Any]) -> list[rich.table.Table]:
  """The facts of `--json`, by domain: perplexity, bits per byte, and differences from the first."""
  share, rows, domains = f'{100 * facts["confidence"]:g}%', facts['rows'], facts['domains']

  def by_domain(title: str, rows: Sequence[Mapping], cell: Callable[[Mapping], str]):
    scored = [[*map(row['domains'].get, domains), row['overall']] for row in rows]
    lines = [[row['label'], *map(cell, line)] for row, line in zip(rows, scored)]
    return cli.table(title, ['checkpoint'], [*domains, 'overall'], lines)

  perplexity = lambda score: _cell(score['perplexity'], scores.number)
  bits = lambda score: _cell(score['bits_per_byte'], '{:.4f}'.format)
  difference = lambda score: _cell(score['difference']['bits_per_byte'], '{:+.4f}'.format, '*')
  made = [by_domain(f'Perplexity, and its {share} interval', rows, perplexity)]
  made += [by_domain(f'Bits per byte, and its {share} interval', rows, bits)]
  if len(rows) > 1:
    title = f'Bits per byte minus those of {rows[0]["label"]}; *: the {share} interval excludes 0'
    made.append(by_domain(title, rows[1:], difference))
  if shares := routing.own_shares(facts):
    title = "Tokens with their domain's expert"
    made.append(cli.table(title, ['checkpoint', 'router'], domains, shares))
  return made


def _cell(measure: Mapping[str, Any], text: Callable[[float], str], mark: str = '') -> str:
  """A value above its interval, if it has one; marked where the interval excludes 0."""
  value, low, high = measure['value'], measure['low'], measure['high']
  if low is None:
    return text(value)
  return f'{text(value)}{mark if low > 0 or high < 0 else ""}\n{text(low)} … {text(high)}'
