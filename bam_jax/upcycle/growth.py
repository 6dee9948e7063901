"""Mixtures that grow and shrink: experts are added, dropped or replaced; all else stays as it is.

A changed mixture is a view of the old one, read a region at a time. Arrays without experts and the
columns of routers that stay are the same bytes, so that dropping an expert undoes adding it.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from bam_jax import config
from bam_jax.checkpoint import arrays, manifest
from bam_jax.checkpoint.manifest import NEW
from bam_jax.config.strict import require
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.upcycle import merge, rules
from bam_jax.upcycle.sources import Source, check_alike, open_checkpoint


def names_of(mixture: config.Model, sources: Sequence[str], of: str) -> tuple[str, ...]:
  """Its experts' names: a checkpoint's `sources`, or else numbers; UserError if `of` has none."""
  counts = {part.num_experts for part in (mixture.attention_experts, mixture.ffn_experts) if part}
  require(counts, f'{of} is a dense model, without experts: name a mixture.')
  require(len(counts) == 1, f'{of} has other numbers of attention and of FFN experts: mix it anew.')
  [count] = counts
  return tuple(sources) if len(sources) == count else tuple(map(str, range(count)))


def number_of(expert: str, names: Sequence[str], of: str) -> int:
  """The number of an expert that is given by its name, or by number if no name is the same."""
  found = [number for number, name in enumerate(names) if name == expert]
  if not found:
    found = [number for number in range(len(names)) if str(number) == expert]
  if len(found) == 1:
    return found[0]
  wrong = f'several experts {expert!r}: give its number' if found else f'no expert {expert!r}'
  listed = ', '.join(f'{number}: {name}' for number, name in enumerate(names))
  raise UserError(f'{of} has {wrong}. Its experts are {listed}.')


def resized(
  mixture: config.Model, experts: Sequence[int], dense: config.Model | None = None
) -> config.Model:
  """The mixture with other experts: numbers of its own ones, or NEW for the dense model."""
  attention, ffn, rank = mixture.attention_experts, mixture.ffn_experts, mixture.embedding_rank
  wrong = f'A mixture with embedding_rank={rank} has embeddings that depend on all of its sources'
  require(not rank, f'{wrong}: mix the ones that you want anew.')
  if attention:
    own = config.Rope(mixture.rope_theta, mixture.rope_scaling)
    ropes = attention.ropes or (own,) * attention.num_experts
    new = dense and config.Rope(dense.rope_theta, dense.rope_scaling)
    ropes = tuple(new if number == NEW else ropes[number] for number in experts)
    ropes = () if set(ropes) == {own} else ropes
    attention = dataclasses.replace(attention, num_experts=len(experts), ropes=ropes)
  ffn = ffn and dataclasses.replace(ffn, num_experts=len(experts))
  return dataclasses.replace(mixture, attention_experts=attention, ffn_experts=ffn)


class _Changed:
  """Reads a mixture with other experts: its own ones by number, or NEW, a dense model.

  `columns` has the new expert's column by router, and by bias of routers.
  """

  def __init__(self, mixture: Source, experts, dense: Source | None, columns):
    self._mixture, self._experts, self._dense, self._columns = mixture, experts, dense, columns
    model, made = mixture.meta.model, mixture.meta.manifest and mixture.meta.manifest.upcycle
    self._folds = rules.folds(model) if made and made.norms == 'fold' else {}
    self._axes, self.specs = {}, dict(mixture.reader.specs)
    for rule in rules.rules(model):
      if rule.how == 'stack' or not rule.source:  # a router has its experts on the last axis
        shape, dtype = self.specs[rule.target]
        axis = self._axes[rule.target] = 1 if rule.source else len(shape) - 1
        shape = (*shape[:axis], len(experts), *shape[axis + 1 :])
        self.specs[rule.target] = arrays.Spec(shape, dtype)

  def read(self, path: str, index: arrays.Index = ()) -> np.ndarray:
    """A region of an array, without the axes of integers in `index`."""
    if path not in self._axes:
      return self._mixture.reader.read(path, index)
    axis, parts = self._axes[path], []
    box = [slice(*bounds) for bounds in arrays.bounds(self.specs[path], index)]
    for number in self._experts[box[axis]]:
      if number == NEW:
        part = np.expand_dims(self._new(path, [*box[:axis], *box[axis + 1 :]]), axis)
        parts.append(part.astype(self.specs[path].dtype, copy=False))
      else:
        region = *box[:axis], slice(number, number + 1), *box[axis + 1 :]
        parts.append(self._mixture.reader.read(path, region))
    one = tuple(0 if isinstance(at, int) else slice(None) for at in index)
    return np.concatenate(parts, axis)[one]

  def _new(self, path: str, box: Sequence[slice]) -> np.ndarray:
    """A region of the new expert's array, or of its column."""
    if path in self._columns:
      return self._columns[path][tuple(box)]
    reader, (layers, *rest), made = self._dense.reader, box, []
    for layer in range(layers.start, layers.stop):  # one at a time, as some sources are read
      index = layer, *rest
      array = reader.read(path, index)
      arrays.check_finite(array, self._dense.path, path, reader.specs[path], index)
      if norm := self._folds.get(path):
        array = merge.times_norm(array, self._dense, norm, index)
      made.append(array)
    return np.stack(made)


def drop(mixture: Source, experts: Sequence[str]) -> Source:
  """The mixture without some experts, by name or number; UserError if too few would be left."""
  model, of = mixture.meta.model, mixture.path
  names = names_of(model, mixture.meta.sources, of)
  dropped = {number_of(expert, names, of) for expert in experts}
  left = tuple(number for number in range(len(names)) if number not in dropped)
  wrong = f'{of} would keep {len(left)} of its {len(names)} experts'
  require(len(left) > 1, f'{wrong}, and a mixture has two or more: drop fewer.')
  for part, what in ((model.attention_experts, 'attention'), (model.ffn_experts, 'FFN')):
    top_k = part.top_k if part else 0
    few = f'{wrong}, and its {what} chooses top_k={top_k} of them'
    require(top_k <= len(left), f'{few}: drop fewer, or mix it anew with a smaller top_k.')
  return _changed(mixture, left)


def add(mixture: Source, dense: Source, key: jax.Array, init: str = 'random') -> Source:
  """The mixture with a dense model as its last expert; UserError if it does not fit.

  Its column of every router is 0, for init='zero', or drawn like random ones of the mixture, by the
  key, the expert's name and its number. Biases of routers are 0.
  """
  model, made = mixture.meta.model, mixture.meta.manifest and mixture.meta.manifest.upcycle
  count, columns = len(names_of(model, (), mixture.path)), {}
  for rule in rules.rules(model):
    if not rule.source:
      shape = mixture.reader.specs[rule.target].shape[:-1]
      columns[rule.target] = np.zeros(shape, np.float32)
      if rule.how == 'router' and init == 'random':
        rng = merge.generator(key, f'{rule.target}/{dense.meta.run}', count)
        deviation = (made.router_scale if made else 1.0) / math.sqrt(shape[-1])
        columns[rule.target] = deviation * rng.standard_normal(shape, np.float32)
  return _changed(mixture, (*range(count), NEW), dense, columns)


def replace(mixture: Source, dense: Source, expert: str) -> Source:
  """The mixture with a dense model in the place of an expert, whose columns of routers it gets."""
  names = names_of(mixture.meta.model, mixture.meta.sources, mixture.path)
  place = number_of(expert, names, mixture.path)
  routers = [rule.target for rule in rules.rules(mixture.meta.model) if not rule.source]
  columns = {path: mixture.reader.read(path)[..., place] for path in routers}
  experts = tuple(NEW if number == place else number for number in range(len(names)))
  return _changed(mixture, experts, dense, columns)


def check_new(mixture: Source, grown: Source) -> None:
  """UserError when the new expert's values are those of an expert of the mixture before."""
  place = grown.meta.manifest.grown.experts.index(NEW)
  stacked = [rule.target for rule in rules.rules(mixture.meta.model) if rule.how == 'stack']
  places = [(path, layer) for path in stacked for layer in range(mixture.meta.model.num_layers)]
  for number, name in enumerate(names_of(mixture.meta.model, mixture.meta.sources, mixture.path)):
    if all(
      np.array_equal(grown.reader.read(path, (n, place)), mixture.reader.read(path, (n, number)))
      for path, n in places
    ):
      wrong = f'The new expert holds the same values as expert {number} ({name}) of {mixture.path}'
      raise UserError(f'{wrong}: give another model.')


def _changed(mixture: Source, experts: tuple[int, ...], dense=None, columns=()) -> Source:
  """The mixture with other experts, as if it were a checkpoint in the mixture's place."""
  meta, both = mixture.meta, (mixture, *((dense,) if dense else ()))
  if dense:
    attention = meta.model.attention_experts
    own_keys = attention and not attention.shared_kv
    of_one = mixture._replace(meta=dataclasses.replace(meta, model=meta.model.dense()))
    check_alike([of_one, dense], 'bam_kv_experts' if own_keys else 'btx')
  names, before = names_of(meta.model, meta.sources, mixture.path), meta.manifest
  path = lambda source: str(folders.absolute(source.folder))
  origins = tuple(manifest.Source(path(one), one.meta.run, one.meta.step) for one in both)
  how, grown = before and before.upcycle, manifest.Grown(experts, meta.sources, before)
  meta = dataclasses.replace(
    meta,
    model=resized(meta.model, experts, dense and dense.meta.model),
    sequence_length=min(one.meta.sequence_length for one in both),
    sources=tuple(dense.meta.run if number == NEW else names[number] for number in experts),
    manifest=manifest.Manifest('', manifest.now(), origins, (), how, grown=grown),
  )
  reader = _Changed(mixture, experts, dense, columns)
  check = lambda: [one.check() for one in both] and None
  return mixture._replace(meta=meta, reader=reader, check=check)


def open_without(path: str, experts: Sequence[str]) -> Source:
  """Opens a checkpoint; a mixture without some experts, as `drop` leaves it."""
  source = open_checkpoint(path)
  if not experts:
    return source
  dropped = drop(source, experts)
  run = f'{source.meta.run} without {" and ".join(experts)}'
  return dropped._replace(meta=dataclasses.replace(dropped.meta, run=run))
