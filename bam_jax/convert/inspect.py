"""Describes a checkpoint, or compares two.

    python -m bam_jax.convert inspect DIR
    python -m bam_jax.convert inspect runs/mine/seed runs/mine/code

Each is a run's folder (its newest checkpoint), a step's, or an output of `convert`. Two, A and B,
are compared array by array, by ||A - B|| / ||A|| and the cosine similarity; then by part of the
model, which shows how far a specialist has moved from its seed, and where. Arrays are streamed.

`--json` writes for one `checkpoint`, `meta`, `arrays` (`path`, `shape`, `dtype`, `bytes`) and
`groups`; for two `a`, `b`, `arrays` (`path`, `{a,b}_{shape,dtype}`, `distance`, `cosine`, `equal`;
null where shapes differ) and `groups`.
"""

import collections
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import rich.table

from bam_jax import checkpoint, cli
from bam_jax.checkpoint import arrays
from bam_jax.config import strict
from bam_jax.config.strict import require
from bam_jax.model import parameters

MAX_ARGUMENTS = 2
GROUPS = ('embeddings', 'norms', 'attention', 'ffn', 'routers')


def main(*paths: str) -> dict[str, Any]:
  """Prints and returns the facts about one checkpoint, or the differences of two."""
  require(paths, 'The path of a checkpoint is required, or two paths to compare.')
  with cli.bytes_bar('Reading') as progress:
    facts = describe(*paths) if len(paths) == 1 else compare(*paths, progress)
  cli.console().print(*tables(facts))
  return facts


def group_of(path: str) -> str:
  """The part of the model that an array belongs to; a head's norms are attention."""
  if path.rpartition('/')[2] in parameters.ROUTERS:
    return 'routers'
  parts = {'embed': 'embeddings', 'attention': 'attention', 'ffn': 'ffn', 'unembed': 'embeddings'}
  return next((parts[word] for word in path.split('/') if word in parts), 'norms')


def describe(path: str) -> dict[str, Any]:
  """The facts about one checkpoint: its `meta`, and the shape and dtype of every array."""
  folder = checkpoint.find(path)
  meta = strict.to_dict(checkpoint.read_meta(folder))
  rows, groups = [], {group: dict(group=group, parameters=0, bytes=0) for group in GROUPS}
  for name, spec in arrays.Reader(folder / 'params').specs.items():
    shape, dtype = list(spec.shape), str(spec.dtype)
    rows.append(dict(path=name, shape=shape, dtype=dtype, bytes=spec.nbytes))
    groups[group_of(name)]['parameters'] += math.prod(spec.shape)
    groups[group_of(name)]['bytes'] += spec.nbytes
  groups = [group for group in groups.values() if group['bytes']]
  return dict(checkpoint=str(folder), meta=meta, arrays=rows, groups=groups)


def compare(a: str, b: str, progress: Callable[[int, int], None]) -> dict[str, Any]:
  """How far the arrays of two checkpoints are apart: ||A - B|| / ||A||, and the cosine."""
  folders = [checkpoint.find(path) for path in (a, b)]
  readers = [arrays.Reader(folder / 'params') for folder in folders]
  rows, products, groups = {}, collections.defaultdict(float), []
  for name in readers[0].specs | readers[1].specs:
    rows[name] = dict(path=name, distance=None, cosine=None, equal=False)
    for side, reader in zip('ab', readers):
      spec = reader.specs.get(name)
      rows[name][f'{side}_shape'] = list(spec.shape) if spec else None
      rows[name][f'{side}_dtype'] = str(spec.dtype) if spec else None
  alike = [name for name, row in rows.items() if row['a_shape'] == row['b_shape']]
  wrong = f'{a} and {b} have no array of the same name and shape'
  require(alike, f'{wrong}: nothing can be compared.')
  places = [(name, at) for name in alike for at in arrays.pieces(name, readers[0].specs[name])]
  regions = arrays.read_ahead((reader, name, at) for name, at in places for reader in readers)
  total, done = sum(reader.specs[name].nbytes for reader in readers for name in alike), 0
  for (name, _), *pair in zip(places, regions, regions):
    x, y = (piece.astype(np.float64).reshape(-1) for piece in pair)
    products[name] += np.array([x @ x, y @ y, x @ y, (x - y) @ (x - y)])
    done += sum(piece.nbytes for piece in pair)
    progress(done, total)
  for name in alike:
    rows[name] |= _distance(products[name])
  for group in (*GROUPS, 'all'):
    members = [products[name] for name in alike if group in (group_of(name), 'all')]
    if members:
      groups.append(dict(group=group, arrays=len(members), **_distance(sum(members))))
  return dict(a=str(folders[0]), b=str(folders[1]), arrays=list(rows.values()), groups=groups)


def _distance(products: np.ndarray) -> dict[str, Any]:
  """||A - B|| / ||A|| and the cosine, from the sums of a a, b b, a b and (a - b)^2."""
  aa, bb, ab, dd = map(float, products)
  cosine = ab / math.sqrt(aa * bb) if aa and bb else None
  return dict(distance=math.sqrt(dd / aa) if aa else None, cosine=cosine, equal=dd == 0)


def tables(facts: Mapping[str, Any]) -> list[rich.table.Table]:
  """What `describe` or `compare` found, for a person."""
  if 'a' in facts:
    title, right = f'A: {facts["a"]}\nB: {facts["b"]}', ['distance', 'cosine', 'equal']
    left = ['path', 'a_shape', 'a_dtype', 'b_shape', 'b_dtype']
    return [
      _table(title, left, right, facts['arrays']),
      _table('By group', ['group'], ['arrays', *right], facts['groups']),
    ]
  meta, made = facts['meta'], facts['meta']['manifest'] or {}
  about = meta | made | {'manifest': None, 'made': None, 'sources': meta['sources']}
  if grown := made.get('grown'):
    about['grown'] = f'experts {_cell(grown["experts"])} of {_cell(grown["names"])}; -1: a new one'
  rows = [{'key': k, 'value': v} for k, v in about.items() if v not in (None, '', [])]
  how = {row['target']: row['how'] for row in made.get('made', ())}
  parameters = [row | {'made_by': how.get(row['path'])} for row in facts['arrays']]
  sources = made.get('sources', ())
  return [
    _table(facts['checkpoint'], ['key', 'value'], [], rows),
    *([_table('Made from', ['path', 'run'], ['step', 'hash'], sources)] if sources else []),
    _table('Parameters', ['path', 'shape', 'dtype', 'made_by'], ['bytes'], parameters),
    _table('In all', ['group'], ['parameters', 'bytes'], facts['groups']),
  ]


def _table(title: str, left: list[str], right: list[str], rows: Iterable) -> rich.table.Table:
  return cli.table(title, left, right, ([_cell(row[k]) for k in (*left, *right)] for row in rows))


def _cell(value: Any) -> Any:
  if isinstance(value, dict):
    return ', '.join(f'{key}={x}' for key, x in value.items() if x not in (None, [], ''))
  if value is None or isinstance(value, bool):
    return {None: '-', True: 'yes', False: 'no'}[value]
  value = ' '.join(map(str, value)) if isinstance(value, list) else value
  return f'{value:.6g}' if isinstance(value, float) else value
