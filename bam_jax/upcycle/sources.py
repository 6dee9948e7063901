"""Dense checkpoints to mix: opened, and compared with each other."""

import itertools
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from flax import traverse_util

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays
from bam_jax.config import strict
from bam_jax.errors import UserError
from bam_jax.model import transformer

DTYPES = ('float32', 'bfloat16')  # what checkpoints may hold


class Source(NamedTuple):
  """An opened dense checkpoint."""

  path: str  # as the user wrote it
  folder: epath.Path
  meta: checkpoint.Meta
  reader: arrays.Reader


def open_sources(paths: Sequence[str]) -> list[Source]:
  """Opens dense checkpoints, in the experts' order; their checksums are left to the caller.

  Raises:
    UserError: one is missing, damaged, a mixture, not a checkpoint of this format, named twice, of
      another architecture or tokenizer than the first, or its arrays do not fit its model.
  """
  sources: list[Source] = []
  seen: dict[str, str] = {}
  for path in paths:
    folder = checkpoint.find(path)
    meta = checkpoint.read_meta(folder)
    other = seen.setdefault(os.path.realpath(folder), path)
    if len(seen) <= len(sources):
      raise UserError(f'{path} is the same checkpoint as {other}: name each source once.')
    if meta.model != meta.model.dense():
      raise UserError(f'{path} is a mixture: only dense models can be mixed.')
    if sources:
      _check_alike(sources[0], path, meta)
    source = Source(path, folder, meta, arrays.Reader(folder / 'params', check=False))
    _check_arrays(source)
    sources.append(source)
  return sources


def check_different(sources: Sequence[Source]) -> None:
  """UserError when two sources hold the same values; reads only until two values differ."""
  for one, other in itertools.combinations(sources, 2):
    if _equal(one.reader, other.reader):
      raise UserError(f'{other.path} holds the same values as {one.path}: leave one of them out.')


def specs(model: config.Model, dtype: np.dtype) -> dict[str, arrays.Spec]:
  """The arrays of a model, all in one dtype."""
  abstract = transformer.Network(model, config.Compute()).abstract()
  flat = traverse_util.flatten_dict(abstract, sep='/')
  return {path: arrays.Spec(tuple(leaf.shape), np.dtype(dtype)) for path, leaf in flat.items()}


def _equal(one: arrays.Reader, other: arrays.Reader) -> bool:
  shapes = lambda reader: {path: spec.shape for path, spec in reader.specs.items()}
  if shapes(one) != shapes(other):
    return False
  by_size = sorted(one.specs, key=lambda path: one.specs[path].nbytes)
  return all(
    np.array_equal(one.read(path, index), other.read(path, index))
    for path in by_size
    for index in arrays.pieces(path, one.specs[path])
  )


def _check_alike(first: Source, path: str, meta: checkpoint.Meta) -> None:
  changes = strict.differences(config.to_dict(first.meta.model), config.to_dict(meta.model))
  if changes:
    raise UserError(f'{path} is another model than {first.path} ({"; ".join(changes[:3])}).')
  if meta.tokenizer_hash != first.meta.tokenizer_hash:
    raise UserError(
      f'{path} was trained with another tokenizer than {first.path}: their tokens mean different '
      'text.'
    )


def _check_arrays(source: Source) -> None:
  """Checks shapes and dtypes; the rule table says what is missing or too many."""
  wanted = specs(source.meta.model, np.float32)
  for path, spec in source.reader.specs.items():
    if path in wanted and spec.shape != wanted[path].shape:
      raise UserError(
        f'{source.path} has {path} of shape {spec.shape} where its model has '
        f'{wanted[path].shape}: it is damaged.'
      )
    if spec.dtype.name not in DTYPES:
      raise UserError(
        f'{source.path} has {path} in {spec.dtype}: only {" and ".join(DTYPES)} can be mixed.'
      )
