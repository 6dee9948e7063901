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
WORDS = {'embed/table': 0, 'unembed/kernel': 1}  # axis of the words, by path


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
  first. Only attention experts with keys of their own may have other rotary positions. Embeddings
  may have more or fewer rows, for words that only one tokenizer has or for none: see `fit_rows`.
  """
  seen: dict[str, str] = {}
  first = sources[0]
  for number, (path, folder, meta, reader, tokenizer, _) in enumerate(sources):
    other = seen.setdefault(os.path.realpath(folder), path)
    same = f'{path} is the same checkpoint as {other}'
    require(len(seen) == number + 1, f'{same}: name each source once.')
    mixed = f'{path} is a mixture: only dense models can be mixed.'
    require(meta.model == meta.model.dense(), mixed)
    changes = strict.differences(config.to_dict(first.meta.model), config.to_dict(meta.model))
    turned = [change for change in changes if change.startswith(('rope_theta', 'rope_scaling'))]
    rows = [change for change in changes if change.startswith('vocab_size')]
    rest = [change for change in changes if change not in (*turned, *rows)]
    what = f'{path} differs from the model of {first.path}'
    tied = any(change.startswith('tied_embeddings') for change in rest)
    fix = ': convert upcycle --untie copies the table of tied ones as their head' if tied else ''
    require(not rest, f'{what} ({"; ".join(rest[:3])}){fix}.')
    fix = (
      'only method bam_kv_experts keeps a rotation for each expert; convert upcycle --rope=first'
    )
    wrong = f"{what} ({'; '.join(turned)}): {fix} takes the first's for all, to be trained on."
    require(not turned or method == 'bam_kv_experts', wrong)
    if meta.words != first.meta.words:
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
  found = [config.Rope(m.rope_theta, m.rope_scaling) for m in (s.meta.model for s in sources)]
  return found if len(set(found)) > 1 else []


class _Rows:
  """Reads a model as if it had the first source's words: later rows are dropped, or the first's."""

  def __init__(self, own: Reader, first: Reader):
    self._own, self._first, self.specs = own, first, dict(own.specs)
    for path in WORDS.keys() & own.specs.keys():
      self.specs[path] = first.specs[path]._replace(dtype=own.specs[path].dtype)

  def read(self, path: str, index: arrays.Index = ()) -> np.ndarray:
    if path not in WORDS:
      return self._own.read(path, index)
    axis = WORDS[path]
    box = [slice(*bounds) for bounds in arrays.bounds(self.specs[path], index)]
    start, stop = box[axis].start, box[axis].stop
    middle = min(max(start, self._own.specs[path].shape[axis]), stop)
    parts = []
    for reader, some in ((self._own, slice(start, middle)), (self._first, slice(middle, stop))):
      if some.start < some.stop:
        region = tuple(some if number == axis else one for number, one in enumerate(box))
        parts.append(reader.read(path, region).astype(self.specs[path].dtype, copy=False))
    return np.concatenate(parts, axis) if len(parts) > 1 else parts[0]


def fit_rows(sources: Sequence[Source]) -> list[Source]:
  """The sources, with embeddings of the first's words: rows of others' own words are dropped.

  Where a source has fewer rows than the first, it has the first's.
  """
  first, rest = sources[0], sources[1:]
  return [first, *(one._replace(reader=_Rows(one.reader, first.reader)) for one in rest)]
