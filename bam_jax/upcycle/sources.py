"""Dense checkpoints to mix: opened, and compared with each other."""

import itertools
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays
from bam_jax.config import strict
from bam_jax.errors import UserError

DTYPES = ('float32', 'bfloat16')  # what checkpoints may hold


class Source(NamedTuple):
  """An opened dense checkpoint."""

  path: str  # as the user wrote it
  folder: epath.Path
  meta: checkpoint.Meta
  reader: arrays.Reader


def open_sources(paths: Sequence[str]) -> list[Source]:
  """Opens dense checkpoints, in the experts' order; the caller verifies their checksums.

  UserError when one is missing, damaged, a mixture, named twice, or of another architecture or
  tokenizer than the first, or its arrays do not fit its model.
  """
  sources: list[Source] = []
  seen: dict[str, str] = {}
  for path in paths:
    folder = checkpoint.find(path)
    meta = checkpoint.read_meta(folder)
    first = sources[0].meta if sources else meta
    other = seen.setdefault(os.path.realpath(folder), path)
    if len(seen) <= len(sources):
      raise UserError(f'{path} is the same checkpoint as {other}: name each source once.')
    if meta.model != meta.model.dense():
      raise UserError(f'{path} is a mixture: only dense models can be mixed.')
    if changes := strict.differences(config.to_dict(first.model), config.to_dict(meta.model)):
      raise UserError(f'{path} differs from the model of {paths[0]} ({"; ".join(changes[:3])}).')
    if sources and meta.tokenizer_hash != first.tokenizer_hash:
      tokenizer = checkpoint.open_tokenizer(folder, meta)
      if found := tokenizer.difference(checkpoint.open_tokenizer(sources[0].folder, first)):
        raise UserError(f'{path} was trained with another tokenizer than {paths[0]}: {found}.')
    reader = checkpoint.open_params(folder, meta.model, check=False)
    for name, (_, dtype) in reader.specs.items():
      if dtype.name not in DTYPES:
        raise UserError(f'{path} has {name} in {dtype}: only {" and ".join(DTYPES)} can be mixed.')
    sources.append(Source(path, folder, meta, reader))
  return sources


def check_different(sources: Sequence[Source]) -> None:
  """UserError when two sources hold the same values; reads only until two values differ."""
  for one, other in itertools.combinations(sources, 2):
    specs = one.reader.specs
    if all(
      np.array_equal(one.reader.read(path, index), other.reader.read(path, index))
      for path in sorted(specs, key=lambda path: specs[path].nbytes)
      for index in arrays.pieces(path, specs[path])
    ):
      raise UserError(f'{other.path} holds the same values as {one.path}: remove one of them.')
