"""What a checkpoint holds, and how far two are apart; a few pieces in memory at a time."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import rich.table

from bam_jax import checkpoint
from bam_jax.checkpoint import arrays
from bam_jax.config import strict
from bam_jax.errors import UserError

Progress = Callable[[int, int], None]  # bytes read, and in all
GROUPS = ('embeddings', 'norms', 'attention', 'ffn', 'routers')


def group_of(path: str) -> str:
  """The part of the model that an array belongs to; a head's norms are attention."""
  if '/router' in path:
    return 'routers'
  if path.startswith(('embed/', 'unembed/')):
    return 'embeddings'
  for part in ('attention', 'ffn'):
    if path.startswith(f'blocks/{part}/'):
      return part
  return 'norms'


@dataclasses.dataclass
class _Moments:
  """Sums over the values of an array, in float64."""

  count: int = 0
  total: float = 0.0
  squares: float = 0.0
  least: float = math.inf
  most: float = -math.inf
  not_finite: int = 0

  def add(self, array: np.ndarray) -> None:
    finite = np.isfinite(array)
    if not finite.all():
      self.not_finite += int(array.size - finite.sum())
      array = array[finite]
    if not array.size:
      return
    self.count += array.size
    values = array.astype(np.float64).reshape(-1)
    self.total += float(values.sum())
    self.squares += float(values @ values)
    self.least, self.most = min(self.least, values.min()), max(self.most, values.max())

  def facts(self) -> dict[str, float | None]:
    if not self.count:
      return dict(mean=None, std=None, min=None, max=None, not_finite=self.not_finite)
    mean = self.total / self.count
    variance = max(0.0, self.squares / self.count - mean**2)
    return dict(
      mean=mean,
      std=math.sqrt(variance),
      min=float(self.least),
      max=float(self.most),
      not_finite=self.not_finite,
    )


@dataclasses.dataclass
class _Distance:
  """Sums over the values of two arrays of one shape, in float64."""

  of_a: float = 0.0  # sum of squares
  of_b: float = 0.0
  of_both: float = 0.0  # sum of products
  of_difference: float = 0.0  # sum of squares
  equal: bool = True

  def add(self, a: np.ndarray, b: np.ndarray) -> None:
    a, b = (x.astype(np.float64).reshape(-1) for x in (a, b))
    difference = a - b
    self.of_a += float(a @ a)
    self.of_b += float(b @ b)
    self.of_both += float(a @ b)
    self.of_difference += float(difference @ difference)
    self.equal &= bool((a == b).all())

  def join(self, other: '_Distance') -> None:
    for field in ('of_a', 'of_b', 'of_both', 'of_difference'):
      setattr(self, field, getattr(self, field) + getattr(other, field))
    self.equal &= other.equal

  def facts(self) -> dict[str, Any]:
    norms = math.sqrt(self.of_a * self.of_b)
    return dict(
      distance=math.sqrt(self.of_difference / self.of_a) if self.of_a else None,
      cosine=self.of_both / norms if norms else None,
      equal=self.equal,
    )


def describe(path: str, progress: Progress) -> dict[str, Any]:
  """The facts about one checkpoint: its `meta`, and for every array shape, dtype and values."""
  folder = checkpoint.find(path)
  meta = checkpoint.read_meta(folder)
  reader = arrays.Reader(folder / 'params')
  names = list(reader.specs)
  moments = {name: _Moments() for name in names}
  for name, (piece,) in _pieces([reader], names, progress):
    moments[name].add(piece)
  rows = []
  for name in names:
    spec = reader.specs[name]
    facts = dict(shape=list(spec.shape), dtype=str(spec.dtype), bytes=spec.nbytes)
    rows.append({'path': name, **facts, **moments[name].facts()})
  groups = [
    {
      'group': group,
      'parameters': sum(math.prod(r['shape']) for r in rows if group_of(r['path']) == group),
      'bytes': sum(r['bytes'] for r in rows if group_of(r['path']) == group),
    }
    for group in GROUPS
  ]
  return {
    'checkpoint': str(folder),
    'meta': strict.to_dict(meta),
    'arrays': rows,
    'groups': [group for group in groups if group['parameters']],
  }


def compare(a: str, b: str, progress: Progress) -> dict[str, Any]:
  """How far the arrays of two checkpoints are apart: ||A - B|| / ||A||, and the cosine."""
  folders = [checkpoint.find(path) for path in (a, b)]
  readers = [arrays.Reader(folder / 'params') for folder in folders]
  ours, theirs = (reader.specs for reader in readers)
  rows, distances = [], {}
  for name in [*ours, *(name for name in theirs if name not in ours)]:
    row: dict[str, Any] = {'path': name}
    for side, specs in (('a', ours), ('b', theirs)):
      spec = specs.get(name)
      row[f'{side}_shape'] = list(spec.shape) if spec else None
      row[f'{side}_dtype'] = str(spec.dtype) if spec else None
    if row['a_shape'] == row['b_shape']:
      distances[name] = _Distance()
    rows.append(row)
  if not distances:
    raise UserError(f'{a} and {b} have no array of one name and shape: nothing can be compared.')
  for name, (mine, other) in _pieces(readers, list(distances), progress):
    distances[name].add(mine, other)
  none = dict(distance=None, cosine=None, equal=False)
  for row in rows:
    row |= distances[row['path']].facts() if row['path'] in distances else none
  groups = []
  for group in (*GROUPS, 'all'):
    joined = [one for name, one in distances.items() if group in (group_of(name), 'all')]
    if joined:
      whole = _Distance()
      for one in joined:
        whole.join(one)
      groups.append({'group': group, 'arrays': len(joined), **whole.facts()})
  return {'a': str(folders[0]), 'b': str(folders[1]), 'arrays': rows, 'groups': groups}


def tables(facts: dict[str, Any]) -> list[rich.table.Table]:
  """What `describe` or `compare` found, for a person."""
  return _comparison(facts) if 'a' in facts else _description(facts)


def _pieces(
  readers: Sequence[arrays.Reader], names: Sequence[str], progress: Progress
) -> Iterator[tuple[str, list[np.ndarray]]]:
  """The arrays piece by piece, one of each reader."""
  places = [
    (name, index) for name in names for index in arrays.pieces(name, readers[0].specs[name])
  ]
  total = sum(reader.specs[name].nbytes for reader in readers for name in names)
  regions = arrays.read_ahead((reader, name, index) for name, index in places for reader in readers)
  done = 0
  for name, _ in places:
    read = [next(regions) for _ in readers]
    done += sum(array.nbytes for array in read)
    progress(done, total)
    yield name, read


def _description(facts: dict[str, Any]) -> list[rich.table.Table]:
  meta = facts['meta']
  table = rich.table.Table(title=facts['checkpoint'], show_header=False)
  for key in ('run', 'step', 'method', 'sequence_length', 'format', 'tokenizer_hash'):
    if meta[key] is not None:
      table.add_row(key, str(meta[key]))
  table.add_row('model', _inline(meta['model']))
  table.add_row('versions', _inline(meta['versions']))
  found, made = [table], meta['manifest']
  if made:
    for key in ('command', 'time', 'seed', 'name'):
      if made[key] != '':
        table.add_row(key, str(made[key]))
    if made['upcycle']:
      table.add_row('upcycle', _inline(made['upcycle']))
    origins = _table('Made from', ['source', 'run'], ['step', 'SHA-256'])
    for source in made['sources']:
      short = source['hash'][:16] if source['hash'] else '-'
      origins.add_row(source['path'], source['run'] or '-', _number(source['step']), short)
    found.append(origins)
  hows = {row['target']: row['how'] for row in made['made']} if made else {}
  values = ['mean', 'std', 'min', 'max']
  params = _table('Parameters', ['array', 'shape', 'dtype', 'made by'], ['bytes', *values])
  for row in facts['arrays']:
    shown = [_number(row[key]) for key in values]
    params.add_row(
      row['path'] + (f' ({row["not_finite"]} not finite)' if row['not_finite'] else ''),
      ' '.join(map(str, row['shape'])),
      row['dtype'],
      hows.get(row['path'], '-'),
      f'{row["bytes"]:,}',
      *shown,
    )
  groups = _table('In all', ['group'], ['parameters', 'bytes'])
  for row in facts['groups']:
    groups.add_row(row['group'], f'{row["parameters"]:,}', f'{row["bytes"]:,}')
  return [*found, params, groups]


def _comparison(facts: dict[str, Any]) -> list[rich.table.Table]:
  title = f'A: {facts["a"]}\nB: {facts["b"]}'
  params = _table(title, ['array', 'A', 'B'], ['|A-B|/|A|', 'cosine'])
  for row in facts['arrays']:
    sides = [
      ' '.join([*map(str, row[f'{side}_shape']), row[f'{side}_dtype']])
      if row[f'{side}_shape']
      else 'absent'
      for side in 'ab'
    ]
    params.add_row(row['path'], *sides, *_apart(row))
  groups = _table('By group', ['group'], ['arrays', '|A-B|/|A|', 'cosine'])
  for row in facts['groups']:
    groups.add_row(row['group'], str(row['arrays']), *_apart(row))
  return [params, groups]


def _apart(row: dict[str, Any]) -> tuple[str, str]:
  if row['equal']:
    return 'equal', '1'
  return _number(row['distance']), '-' if row['cosine'] is None else f'{row["cosine"]:.6f}'


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> rich.table.Table:
  table = rich.table.Table(title=title)
  for name in left:
    table.add_column(name, overflow='fold')
  for name in right:
    table.add_column(name, justify='right')
  return table


def _number(value: float | None) -> str:
  return '-' if value is None else f'{value:.4g}' if isinstance(value, float) else str(value)


def _inline(facts: dict[str, Any]) -> str:
  return ', '.join(f'{key}={value}' for key, value in facts.items() if value not in (None, [], ''))
