"""Dense checkpoints to mix: opened, and compared with each other."""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from etils import epath

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays, integrity
from bam_jax.config import strict
from bam_jax.config.strict import require
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError

DTYPES = ('float32', 'bfloat16', 'float16')  # what sources may hold


class Reader(Protocol):
  """Reads a model's arrays, by our paths, a region at a time."""

  specs: Mapping[str, arrays.Spec]

  def read(self, path: str, index: arrays.Index = ()) -> np.ndarray: ...


class Source(NamedTuple):
  """An opened dense model."""

  path: str  # as the user wrote it
  folder: epath.Path
  meta: checkpoint.Meta
  reader: Reader
  tokenizer: Callable[[], Tokenizer] | None = None  # opens it
  check: Callable[[], None] = lambda: None  # raises UserError if stored values are damaged


def open_checkpoint(path: str) -> Source:
  """Opens a checkpoint; UserError when it is missing or damaged, or its arrays do not fit it."""
  folder = checkpoint.find(path)
  meta = checkpoint.read_meta(folder)
  reader = checkpoint.open_params(folder, meta.model, check=False)
  tokenizer = lambda: checkpoint.open_tokenizer(folder, meta)
  return Source(path, folder, meta, reader, tokenizer, lambda: integrity.check(folder, ['params']))


def check_alike(sources: Sequence[Source], method: config.Method) -> None:
  """UserError unless sources, in the experts' order, can be mixed.

  That is when one is a mixture, is named twice, or is of another architecture or tokenizer than the
  first. Only attention experts with keys of their own may have other rotary positions.
  """
  seen: dict[str, str] = {}
  first = sources[0]
  for number, (path, folder, meta, reader, tokenizer, _) in enumerate(sources):
    other = seen.setdefault(os.path.realpath(folder), path)
    same = f'{path} is the same checkpoint as {other}: name each source once.'
    require(len(seen) == number + 1, same)
    dense = meta.model == meta.model.dense()
    require(dense, f'{path} is a mixture: only dense models can be mixed.')
    changes = strict.differences(config.to_dict(first.meta.model), config.to_dict(meta.model))
    turned = [change for change in changes if change.startswith(('rope_theta', 'rope_scaling'))]
    rest = [change for change in changes if change not in turned]
    what = f'{path} differs from the model of {first.path}'
    require(not rest, f'{what} ({"; ".join(rest[:3])}).')
    fix = 'only method bam_kv_experts keeps a rotation for each expert'
    require(not turned or method == 'bam_kv_experts', f'{what} ({"; ".join(turned)}): {fix}.')
    if meta.tokenizer_hash != first.meta.tokenizer_hash:
      found = tokenizer().difference(first.tokenizer())
      require(not found, f'{path} was trained with another tokenizer than {first.path}: {found}.')
    for name, (_, dtype) in reader.specs.items():
      wrong = f'{path} has {name} in {dtype}: only {" and ".join(DTYPES)} can be mixed.'
      require(dtype.name in DTYPES, wrong)


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
