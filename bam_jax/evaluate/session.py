"""A comparison as its reader at a terminal sees it: progress, tables, notes, and pictures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.table

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
    routed = any(routing.expert_names(entry.source.meta) for entry in entries)
    require(routed, '--routing requires a checkpoint with routers: remove it.')
    with folders.writing(folder):
      Path(folder).mkdir(parents=True, exist_ok=True)
  console, notes = cli.console(), comparison.notes(entries)
  for note in notes:
    console.print(note, soft_wrap=True)
  for number, entry in enumerate(entries, 1):
    if not console.is_terminal:
      console.print(f'Scoring {entry.source.path} ({number} of {len(entries)})', soft_wrap=True)
    comparison.score(entry, domains, options, folder is not None)
  facts = {
    'mesh': config.to_dict(options.mesh),
    **{key: getattr(options, key) for key in ('dtype', 'confidence', 'resamples', 'seed')},
    'domains': [domain.name for domain in domains],
    'notes': notes,
    'rows': comparison.compare(entries, domains, options),
  }
  for table in tables(facts):
    console.print(table, '')
  if folder is not None:
    with folders.writing(folder):
      routing.draw(Path(folder), facts['rows'])
    console.print(f'Pictures of the routers are in {folder}.', soft_wrap=True)
  return facts


def tables(facts: Mapping[str, Any]) -> list[rich.table.Table]:
  """The facts of `--json`, by domain: perplexity, bits per byte, and differences from the first."""
  rows, domains = facts['rows'], facts['domains']
  share = f'{100 * facts["confidence"]:g}% interval'
  scores_of = lambda row: (*row['domains'].values(), row['overall'])
  known = any(score['perplexity']['low'] is not None for row in rows for score in scores_of(row))
  interval, legend = (f', and its {share}', f'; *: the {share} excludes 0') if known else ('', '')

  def by_domain(title: str, rows: Sequence[Mapping], cell: Callable[[Mapping], str]):
    lines = [[row['label'], *map(cell, scores_of(row))] for row in rows]
    return cli.table(title, ['checkpoint'], [*domains, 'overall'], lines)

  perplexity = lambda score: _cell(score['perplexity'], scores.number)
  bits = lambda score: _cell(score['bits_per_byte'], '{:.4f}'.format)
  difference = lambda score: _cell(score['difference']['bits_per_byte'], '{:+.4f}'.format, '*')
  made = [by_domain(f'Perplexity{interval}', rows, perplexity)]
  made += [by_domain(f'Bits per byte{interval}', rows, bits)]
  if len(rows) > 1:
    title = f'Bits per byte minus those of {rows[0]["label"]}{legend}'
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
