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
from bam_jax.config.strict import require
from bam_jax.errors import UserError

DTYPES = ('float32', 'bfloat16')  # what checkpoints may hold


class Source(NamedTuple):
  """An opened dense checkpoint."""

  path: str  # as the user wrote it
  folder: epath.Path
  meta: checkpoint.Meta
  reader: arrays.Reader


def open_sources(paths: Sequence[str], method: config.Method) -> list[Source]:
  """Opens dense checkpoints, in the experts' order; the caller verifies their checksums.

  UserError when one is missing, damaged, a mixture, named twice, or of another architecture or
  tokenizer than the first, or its arrays do not fit its model. Only attention experts with keys of
  their own may have other rotary positions.
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
    changes = strict.differences(config.to_dict(first.model), config.to_dict(meta.model))
    turned = [change for change in changes if change.startswith(('rope_theta', 'rope_scaling'))]
    rest = [change for change in changes if change not in turned]
    what = f'{path} differs from the model of {paths[0]}'
    require(not rest, f'{what} ({"; ".join(rest[:3])}).')
    fix = 'only method bam_kv_experts keeps a rotation for each expert'
    require(not turned or method == 'bam_kv_experts', f'{what} ({"; ".join(turned)}): {fix}.')
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


def ropes(sources: Sequence[Source]) -> list[config.Rope]:
  """The rotary positions of every source; empty if all are alike."""
  models = [source.meta.model for source in sources]
  found = [config.Rope(model.rope_theta, model.rope_scaling) for model in models]
  return found if len(set(found)) > 1 else []
