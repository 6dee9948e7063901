"""The comparison for a terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.table

from bam_jax.reports import scores

Cell = Callable[[Mapping[str, Any]], str]


def tables(facts: Mapping[str, Any]) -> list[rich.table.Table]:
  """Perplexity, bits per byte, and the difference from the first checkpoint, by domain.

  Args:
    facts: of `--json`.
  """
  share = f'{100 * facts["confidence"]:g}%'
  made = [
    _table(f'Perplexity, and its {share} interval', facts, facts['rows'], _perplexity),
    _table(f'Bits per byte, and its {share} interval', facts, facts['rows'], _bits),
  ]
  first, *others = facts['rows']
  if others:
    title = f'Bits per byte less those of {first["label"]}; *: the {share} interval is without 0'
    made.append(_table(title, facts, others, _difference))
  routed = [row for row in facts['rows'] if row['routing']]
  if routed:
    made.append(_shares(facts['domains'], routed))
  return made


def _table(
  title: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], cell: Cell
) -> rich.table.Table:
  table = rich.table.Table(title=title, title_justify='left', box=None)
  table.add_column('checkpoint', overflow='fold')
  for name in (*facts['domains'], 'overall'):
    table.add_column(name, justify='right')
  for row in rows:
    scores = [*(row['domains'][name] for name in facts['domains']), row['overall']]
    table.add_row(row['label'], *map(cell, scores))
  return table


def _shares(domains: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> rich.table.Table:
  title = "Tokens with their domain's expert"
  table = rich.table.Table(title=title, title_justify='left', box=None)
  for name in ('checkpoint', 'router'):
    table.add_column(name, overflow='fold')
  for name in domains:
    table.add_column(name, justify='right')
  for row in rows:
    for router, by_domain in row['routing'].items():
      table.add_row(row['label'], router, *(own_share(by_domain[name]) for name in domains))
  return table


def own_share(facts: Mapping[str, Any]) -> str:
  """The mean over the layers, as a percentage."""
  layers = facts['own_share']
  return '–' if layers is None else f'{100 * sum(layers) / len(layers):.0f}%'


def _perplexity(score: Mapping[str, Any]) -> str:
  return _cell(score['perplexity'], scores.number)


def _bits(score: Mapping[str, Any]) -> str:
  return _cell(score['bits_per_byte'], '{:.4f}'.format)


def _difference(score: Mapping[str, Any]) -> str:
  measure = score['difference']['bits_per_byte']
  low, high = measure['low'], measure['high']
  mark = '*' if low is not None and (low > 0 or high < 0) else ''
  return _cell(measure, '{:+.4f}'.format, mark)


def _cell(measure: Mapping[str, Any], say: Callable[[float], str], mark: str = '') -> str:
  text = say(measure['value']) + mark
  if measure['low'] is None:
    return text
  return f'{text}\n{say(measure["low"])} … {say(measure["high"])}'
