"""Scores in tasks, for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.table


def table(rows: Sequence[Mapping[str, Any]]) -> rich.table.Table:
  """Every metric of every task and group, a column a checkpoint, with its standard error.

  In brackets the difference from the first checkpoint, with its own.

  Args:
    rows: of `--json`.
  """
  made = rich.table.Table(box=None)
  for name in ('task', 'shots', 'metric'):
    made.add_column(name, overflow='fold')
  names = [row['run'] for row in rows]
  for row in rows:
    label = row['run'] if names.count(row['run']) == 1 else row['checkpoint']
    made.add_column(label, justify='right', overflow='fold')
  for name, facts in rows[0]['tasks'].items():
    for metric in facts['metrics']:
      cells = [_cell(row['tasks'][name]['metrics'][metric]) for row in rows]
      made.add_row(name, str(facts['few_shot']), metric, *cells)
  for name, metrics in rows[0]['groups'].items():
    for metric in metrics:
      made.add_row(name, '', metric, *(_cell(row['groups'][name][metric]) for row in rows))
  return made


def _cell(measure: Mapping[str, float | None]) -> str:
  said = _with_error(f'{measure["value"]:.4f}', measure['stderr'])
  difference = measure.get('difference')
  if difference is None:
    return said
  return f'{said} ({_with_error(f"{difference:+.4f}", measure["difference_stderr"])})'


def _with_error(value: str, error: float | None) -> str:
  return value if error is None else f'{value} ± {error:.4f}'
