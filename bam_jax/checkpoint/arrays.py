"""A checkpoint's arrays on disk, a region at a time: memory is bounded however large they are.

Orbax makes the files, so that every later Orbax restores them on any mesh; tensorstore, with which
Orbax itself stores arrays, reads and fills them. Arrays are named by path, 'blocks/ffn/up'.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax import traverse_util

from bam_jax import errors
from bam_jax.checkpoint import integrity
from bam_jax.config.strict import require
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.parallel import sharding

CHUNK_BYTES = 16 * 2**20  # maximum size of a chunk
READ_BYTES = 2 * CHUNK_BYTES  # maximum read ahead, but at least one region
PENDING_BYTES = 4 * CHUNK_BYTES  # maximum of pending writes
READ_THREADS = 4

Index = tuple[int | slice, ...]


class Spec(NamedTuple):
  """An array without its values."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Bytes of its values."""
    return math.prod(self.shape) * self.dtype.itemsize


class Reader:
  """Reads regions of the arrays of a `params` item, whatever mesh it was written from.

  Attributes:
    specs: all of its arrays by path.
  """

  def __init__(self, folder: epath.PathLike, check: bool = True):
    """Opens the item in a folder; UserError when it is missing or damaged.

    With `check`, its files are read once beforehand, to compare them with their checksums.
    """
    self.folder = epath.Path(folder)
    if check:
      integrity.check(self.folder.parent, [self.folder.name])
    # Files are mapped anew for every read, with a look at their size: no memory has to be filled
    # first, and one that was cut short meanwhile is an error and not a signal.
    context = ts.Context(
      {'cache_pool': {'total_bytes_limit': 2 * CHUNK_BYTES}, 'file_io_mode': {'mode': 'memmap'}}
    )
    # A chunk that was never written is an error and not zeros. Nobody changes a checkpoint.
    options = dict.fromkeys(
      ('fill_missing_data_reads', 'recheck_cached_data', 'recheck_cached_metadata'), False
    )
    try:
      store = ts.KvStore.open(
        {'driver': 'ocdbt', 'base': folders.url(folder)}, context=context
      ).result()
      keys = sorted(key.decode() for key in store.list().result())
      names = [key.removesuffix('/.zarray') for key in keys if key.endswith('/.zarray')]
      opening = {
        path: ts.open(_store(folder, path) | options, context=context)
        for path in (name.replace('.', '/') for name in names)
      }
      self._stores = {path: future.result() for path, future in opening.items()}
    except (OSError, ValueError) as error:
      raise UserError(
        f'{folder} cannot be read ({folders.reason(error)}): it is damaged.'
      ) from error
    require(self._stores, f'{folder} holds no arrays: it is damaged, or not a checkpoint.')
    self.specs = {
      path: Spec(tuple(store.shape), store.dtype.numpy_dtype)
      for path, store in self._stores.items()
    }

  def read(self, path: str, index: Index = ()) -> np.ndarray:
    """A region of an array, without the axes of integers in `index`; UserError when damaged."""
    try:
      return self._stores[path][index].read().result()
    except (OSError, ValueError) as error:
      where = f'{path} of {self.folder}'
      raise UserError(
        f'{where} cannot be read ({folders.reason(error)}): it is damaged.'
      ) from error


class Writer:
  """Writes a new `params` item in regions of whole chunks, each once, in any order.

  A context manager: at the end of the block every value is in its file, or ValueError says what was
  never written; after an error nothing is being written any more. Every array is cut into chunks of
  at most CHUNK_BYTES, each in one layer of one expert. Values are not compressed: float noise is 8%
  smaller then, and takes three times as long to read.
  """

  def __init__(self, folder: epath.PathLike, specs: Mapping[str, Spec]):
    """Makes the item, all of its arrays empty, in a folder that does not exist; its parent does.

    UserError when the disk is full or cannot be written.
    """
    self.folder, self.specs = epath.Path(folder), dict(specs)
    self._missing = {path: math.prod(spec.shape) for path, spec in specs.items()}  # values
    self._pending: collections.deque[tuple[ts.Future, int]] = collections.deque()
    # Orbax writes one value of each array, and with it all that it keeps about an item. Then each
    # array is replaced by an empty one: Orbax's own description of it, but for shape and chunks.
    ones = {path: np.zeros([1] * len(spec.shape), spec.dtype) for path, spec in specs.items()}
    ones = ocp.args.PyTreeSave(traverse_util.unflatten_dict(ones, sep='/'))
    with writing(self.folder):
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        checkpointer.save(self.folder, ones)
      # `new_folder` sees to it that everything is on disk, once and not after each chunk.
      context = ts.Context({'file_io_sync': False, 'cache_pool': {'total_bytes_limit': 0}})
      self._stores = {path: self._create(path, context) for path in specs}

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type | None, *_) -> None:
    try:
      if kind is None:
        self._wait(0)
        missing = [path for path, count in self._missing.items() if count]
        if missing:
          raise ValueError(f'{", ".join(missing)} of {self.folder} was not written whole.')
    finally:
      while self._pending:
        self._pending.popleft()[0].exception()

  def write(self, path: str, index: Index, array: np.ndarray) -> None:
    """Starts to write a region of whole chunks, as `pieces` gives them.

    Blocks while more than PENDING_BYTES are pending. `array` must not change any more. UserError
    when the disk is full or cannot be written; ValueError when shape or dtype do not fit.
    """
    target, dtype = self._stores[path][index], self.specs[path].dtype
    if array.shape != target.shape or array.dtype != dtype:
      raise ValueError(f'{path}[{index}] is {dtype}{target.shape}, not {array.dtype}{array.shape}.')
    self._missing[path] -= array.size
    future = target.write(array, can_reference_source_data_indefinitely=True)
    self._pending.append((future, array.nbytes))
    self._wait(PENDING_BYTES)

  def _create(self, path: str, context: ts.Context) -> ts.TensorStore:
    """Replaces an array of one value by an empty one of the right shape."""
    store = _store(self.folder, path)
    metadata = ts.open(store, context=context).result().spec().to_json()['metadata']
    spec = self.specs[path]
    metadata |= {'shape': spec.shape, 'chunks': chunk_shape(path, spec)}
    # Zeros are stored like any other values: what is not stored was not written.
    options = {'create': True, 'delete_existing': True, 'store_data_equal_to_fill_value': True}
    return ts.open(store | options | {'metadata': metadata}, context=context).result()

  def _wait(self, max_bytes: int) -> None:
    while sum(nbytes for _, nbytes in self._pending) > max_bytes:
      with writing(self.folder):
        self._pending[0][0].result()  # pending until it is done, even if interrupted here
      self._pending.popleft()


def chunk_shape(path: str, spec: Spec) -> tuple[int, ...]:
  """The shape of a chunk: at most CHUNK_BYTES, of one layer and one expert.

  A matrix of a layer is cut along its first axis, as FSDP cuts it; arrays without layers along
  their longest, the vocabulary.
  """
  stacked = _stacked(path, spec)
  chunk = [1 if axis < stacked else size for axis, size in enumerate(spec.shape)]
  axes = range(stacked, len(chunk)) if stacked else [int(np.argmax(spec.shape))]
  for axis in axes:
    others = math.prod(chunk[:axis] + chunk[axis + 1 :])
    fits = max(1, CHUNK_BYTES // (spec.dtype.itemsize * others))
    chunk[axis] = -(-spec.shape[axis] // -(-spec.shape[axis] // fits))  # equal parts
  return tuple(chunk)


def pieces(path: str, spec: Spec) -> Iterator[Index]:
  """Regions of whole chunks that together are the array.

  Of arrays with layers each is one layer, of one expert; of the others, one chunk. They come in the
  order of the values as far as the chunks allow: always so within each slice of the first axis.
  """
  stacked = _stacked(path, spec)
  if stacked:
    yield from itertools.product(*map(range, spec.shape[:stacked]))
    return
  chunk = chunk_shape(path, spec)
  for start in itertools.product(*(range(0, n, c) for n, c in zip(spec.shape, chunk))):
    yield tuple(slice(at, min(at + c, n)) for at, c, n in zip(start, chunk, spec.shape))


def bounds(spec: Spec, index: Index) -> tuple[tuple[int, int], ...]:
  """Start and stop of a region on every axis."""
  index = (*index, *[slice(None)] * (len(spec.shape) - len(index)))
  return tuple(
    (axis, axis + 1) if isinstance(axis, int) else axis.indices(size)[:2]
    for axis, size in zip(index, spec.shape)
  )


def check_finite(array: np.ndarray, place: Any, name: str, spec: Spec, index: Index = ()) -> None:
  """UserError naming the first value that is NaN or infinite in a region of an array."""
  wrong = ~np.isfinite(array)
  if wrong.any():
    box = bounds(spec, index)
    inside = np.argwhere(wrong.reshape([stop - start for start, stop in box]))[0]
    where = [start + int(at) for (start, _), at in zip(box, inside)]
    raise UserError(f'{place} has {array[wrong][0]} at {name}{where}: use another checkpoint.')


def read_ahead(requests: Iterable[tuple[Reader, str, Index]]) -> Iterator[np.ndarray]:
  """Regions in order; while one is worked on, the next ones are read, about READ_BYTES."""
  pending: collections.deque[tuple[int, concurrent.futures.Future]] = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as pool:
    for reader, path, index in requests:
      spec = reader.specs[path]
      nbytes = spec.dtype.itemsize * math.prod(b - a for a, b in bounds(spec, index))
      pending.append((nbytes, pool.submit(reader.read, path, index)))
      while len(pending) > 1 and sum(nbytes for nbytes, _ in pending) > READ_BYTES:
        yield pending.popleft()[1].result()
    while pending:
      yield pending.popleft()[1].result()


def save_args(path: str, spec: Spec) -> ocp.SaveArgs:
  """How Orbax cuts an array that it writes itself, so that reading a layer reads no other."""
  if spec.nbytes <= CHUNK_BYTES:
    return ocp.SaveArgs()
  if stacked := _stacked(path, spec):
    # A bound on the bytes would cut columns, which no layout cuts first.
    return ocp.SaveArgs(shard_axes=tuple(range(stacked)))
  return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)


@contextlib.contextmanager
def writing(folder: epath.PathLike) -> Iterator[None]:
  """Turns what Orbax, tensorstore and the system raise into UserErrors naming `folder`."""
  with folders.writing(folder):
    try:
      yield
    except (OSError, ValueError) as error:
      if jax.process_count() > 1 and errors.of_jax(error):  # another process was lost
        raise
      raise UserError(f'{folder} cannot be written: {folders.reason(error)}.') from error


def _stacked(path: str, spec: Spec) -> int:
  """How many of the first axes count layers and experts."""
  if not path.startswith('blocks/'):
    return 0
  return 1 + sharding.has_experts(path, len(spec.shape))


def _store(folder: epath.PathLike, path: str) -> dict[str, Any]:
  """The tensorstore spec of one array."""
  name = path.replace('/', '.') + '/'
  return {
    'driver': 'zarr',
    'kvstore': {'driver': 'ocdbt', 'base': folders.url(folder), 'path': name},
  }
