"""Documents in random order, in two passes over the disk and in bounded memory.

The first pass writes shards of encoded documents, each in a random order of its own. The second
fills one partition of the store after the other: it draws how many documents of each shard belong
to the partition, reads these, which lie side by side, and orders them anew. Every order of all
documents is equally likely, and the same seed gives the same one.

Legend: S shards, M documents of a partition.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts
from etils import epath

from bam_jax.data import store
from bam_jax.errors import UserError
from bam_jax.files import folders

CHUNK = 2**13  # values along the last axis: what is read for a sequence, and has a checksum
SHARD = 2**23  # a file's; it ends with an index of 16 bytes a chunk
PARTITION_TOKENS = 2**24  # in expectation: what the second pass holds, a few times
PARTITION_DOCUMENTS = 2**18
THREADS = 'data_copy_concurrency', 'file_io_concurrency'  # of tensorstore
FACTS = np.dtype([('tokens', np.int64), ('bytes', np.int64)])  # of a document


def create(
  folder: Path | epath.Path, shape: Sequence[int], dtype: np.dtype, begun: bool
) -> ts.TensorStore:
  """A new array in place of what `folder` holds, or one that was `begun` before."""
  cut = lambda size: [*shape[:-1], size]
  little = {'name': 'bytes', 'configuration': {'endian': 'little'}}
  crc, zstd = {'name': 'crc32c'}, {'name': 'zstd', 'configuration': {'level': 1}}
  inner = {'chunk_shape': cut(CHUNK), 'codecs': [little, zstd, crc], 'index_codecs': [little, crc]}
  metadata = {
    'shape': list(shape),
    'data_type': dtype.name,
    'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': cut(SHARD)}},
    'codecs': [{'name': 'sharding_indexed', 'configuration': inner}],
  }
  spec = {'driver': 'zarr3', 'kvstore': folders.url(folder), 'metadata': metadata}
  spec['store_data_equal_to_fill_value'] = True  # readers take a chunk that is not there for lost
  # One thread for each: the heaps of more keep what was freed in them, hundreds of MB.
  threads = ts.Context(dict.fromkeys(THREADS, {'limit': 1}))
  opened = dict(create=not begun, delete_existing=not begun, open=begun)
  return ts.open(spec, context=threads, **opened).result()


def write_shard(
  path: Path, documents: Sequence[np.ndarray], byte_counts: Sequence[int], seed: Sequence[int]
) -> None:
  """First pass: the ids of some documents to PATH.tokens, their sizes to PATH.documents."""
  order = np.random.default_rng(seed).permutation(len(documents))
  facts = np.array([(len(documents[i]), byte_counts[i]) for i in order], FACTS)
  folders.write_file(f'{path}.tokens', np.concatenate([documents[i] for i in order]).tobytes())
  folders.write_file(f'{path}.documents', facts.tobytes())


def is_written(path: Path) -> bool:
  """Whether all of a shard is there, since its last file is."""
  return Path(f'{path}.documents').exists()


def write_split(
  shards: Sequence[Path],
  folder: Path | epath.Path,
  dtype: np.dtype,
  seed: Sequence[int],
  progress: Path,
) -> dict[str, int]:
  """Second pass: the shards of a split to its arrays in `folder`; returns the sums of the manifest.

  What is done is kept in the file `progress`, from which another attempt goes on: a partition that
  was written in part is written anew. UserError when the arrays cannot be written.
  """
  sums, count_S = np.zeros(3, np.int64), np.zeros(len(shards), np.int64)
  for number, shard in enumerate(shards):
    facts = np.fromfile(f'{shard}.documents', FACTS)
    count_S[number] = len(facts)
    sums += len(facts), facts['tokens'].sum(), facts['bytes'].sum()
  num_documents, num_tokens, _ = sums.tolist()
  partitions = max(-(-num_tokens // PARTITION_TOKENS), -(-num_documents // PARTITION_DOCUMENTS))

  begun = progress.exists()
  nothing = {'partitions': 0, 'read_2S': np.zeros((2, len(shards)), np.int64)}
  done = dict(np.load(progress)) if begun else nothing
  read_2S = done['read_2S']  # of each shard: documents, and their tokens
  try:
    tokens = create(folder / 'tokens', (2, num_tokens), dtype, begun)
    sizes = create(folder / 'bytes', (num_documents,), np.dtype(np.uint32), begun)
    for partition in range(int(done['partitions']), partitions):
      rng = np.random.default_rng([*seed, partition])
      take_S = rng.binomial(count_S - read_2S[0], 1 / (partitions - partition))
      first_document, first_token = read_2S.sum(1).tolist()
      documents, byte_counts = _take(shards, take_S, read_2S, dtype)
      if order := rng.permutation(len(documents)).tolist():
        ids = np.concatenate([documents[i] for i in order])
        lengths_M = np.array([len(documents[i]) for i in order])
        begins = np.zeros_like(ids)
        begins[np.cumsum(lengths_M) - lengths_M] = 1
        _write(tokens, first_token, np.stack([ids, begins]))
        _write(sizes, first_document, byte_counts[order])
      documents = ids = begins = None  # before the next partition's are read
      np.savez(content := io.BytesIO(), partitions=partition + 1, read_2S=read_2S)
      folders.write_file(progress, content.getvalue())
  except (OSError, ValueError) as error:
    raise UserError(f'{folder} cannot be written: {folders.reason(error)}.') from error
  return dict(zip(store.SUMS, sums.tolist()))


def _take(
  shards: Sequence[Path], take_S: np.ndarray, read_2S: np.ndarray, dtype: np.dtype
) -> tuple[list[np.ndarray], np.ndarray]:
  """The next so many documents of each shard, and the bytes of their texts, uint32.

  `read_2S` counts what was read before, and then these too.
  """
  documents, byte_counts = [], [np.zeros(0, np.uint32)]
  for number in np.flatnonzero(take_S).tolist():
    shard, count, (first, place) = shards[number], int(take_S[number]), read_2S[:, number].tolist()
    facts = np.fromfile(f'{shard}.documents', FACTS, count, offset=first * FACTS.itemsize)
    ends = np.cumsum(facts['tokens'])
    ids = np.fromfile(f'{shard}.tokens', dtype, int(ends[-1]), offset=place * dtype.itemsize)
    documents += np.split(ids, ends[:-1])
    byte_counts.append(facts['bytes'].astype(np.uint32))
    read_2S[:, number] += count, ends[-1]
  return documents, np.concatenate(byte_counts)


def _write(array: ts.TensorStore, first: int, values: np.ndarray) -> None:
  array[..., first : first + values.shape[-1]].write(values).result()
