"""A prepared dataset: documents in random order, laid end to end, read in place by every host.

```
DIR/manifest.json              what is here, and what it was made from
DIR/tokenizer.json             (or tokenizer.model) the tokenizer, unchanged
DIR/<domain>/<split>/tokens/   zarr 3, uint16 or uint32 [2, tokens]: ids, and 1 where a document
                               begins: BOS, ids, EOS, BOS, ...
DIR/<domain>/<split>/bytes/    zarr 3, uint32 [documents]: the UTF-8 bytes of each one's text
```
DIR is on a disk or in a bucket. Nothing is copied and no index is held: a reader's memory does not
depend on the size of the dataset. Chunks carry checksums, which every read from storage compares.

Legend: N pieces of one size, S tokens of a piece.
"""

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tensorstore as ts
from etils import epath

from bam_jax.config.strict import require
from bam_jax.data.tokenizer import HUGGING_FACE_FILE, SENTENCEPIECE_FILE, Tokenizer, read_file
from bam_jax.errors import UserError
from bam_jax.files import folders, json_file

FORMAT = 2
MANIFEST = 'manifest.json'
DOMAIN_NAME = re.compile(r'[A-Za-z0-9][\w.-]*', re.ASCII)  # also of splits
SUMS = ('documents', 'tokens', 'bytes')  # of a split, in the manifest
FIX = 'copy or prepare the dataset again'
CACHE_BYTES = 2**23  # of indexes and chunks
REQUESTS = 128  # in flight to a bucket, where each takes tens of milliseconds
BLOCK = 2**20  # tokens read at once of documents in order


def token_dtype(vocab_size: int) -> np.dtype:
  """The narrowest of uint16 and uint32 that holds every id."""
  return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class Documents:
  """The documents of one split of one domain, laid end to end.

  Attributes:
    num_documents, num_tokens, num_bytes: BOS and EOS included; UTF-8 of the texts.
  """

  def __init__(self, folder: Path | epath.Path, sums: Mapping[str, int], dtype: np.dtype):
    """Opens the arrays in `folder`; UserError if they are not there, whole, as `sums` says."""
    self.num_documents, self.num_tokens, self.num_bytes = (sums[key] for key in SUMS)
    self._folder = folder
    self._tokens = self._open('tokens', (2, self.num_tokens), dtype)
    self._bytes = self._open('bytes', (self.num_documents,), np.dtype(np.uint32))

  def __iter__(self) -> Iterator[np.ndarray]:
    """The ids of each document, in order: int32."""
    document = []  # its pieces so far
    for start in range(0, self.num_tokens, BLOCK):
      size = min(BLOCK, self.num_tokens - start)
      (ids_S,), (begins_S,) = read([(self, start)], size)
      rest, *others = np.split(ids_S, np.flatnonzero(begins_S))
      document.append(rest)
      for piece in others:
        if any(map(len, document)):
          yield np.concatenate(document)
        document = [piece]
    if document:
      yield np.concatenate(document)

  def byte_counts(self, count: int | None = None) -> np.ndarray:
    """UTF-8 bytes of the texts of the first documents, or of all: int64 [documents]."""
    count = self.num_documents if count is None else min(count, self.num_documents)
    return self.finish('bytes', self._bytes[:count].read()).astype(np.int64)

  def request(self, start: int, size: int) -> ts.Future:
    """Begins to read ids and where documents begin, [2, up to S], for `finish`."""
    first, last = (min(place, self.num_tokens) for place in (start, start + size))
    return self._tokens[:, first:last].read()

  def finish(self, name: str, future: ts.Future) -> Any:
    """What was asked of an array; UserError when a chunk is missing or damaged."""
    try:
      return future.result()
    except (OSError, ValueError) as error:
      raise self._damaged(name, error) from error

  def _damaged(self, name: str, error: Exception) -> UserError:
    where = f'{self._folder / name} is damaged or not whole'
    return UserError(f'{where} ({folders.reason(error)}): {FIX}.')

  def _open(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> ts.TensorStore:
    # What is missing is an error and not zeros. Nobody changes a dataset that is open.
    how = dict(fill_missing_data_reads=False, recheck_cached_data='open')
    spec = {'driver': 'zarr3', 'kvstore': folders.url(self._folder / name)} | how
    try:
      json_file.load(self._folder / name / 'zarr.json')  # whatever its size
    except (OSError, ValueError) as error:
      raise self._damaged(name, error) from error
    array = self.finish(name, ts.open(spec, context=_context()))
    found, wanted = (array.dtype.numpy_dtype, array.shape), (dtype, shape)
    wrong = f'{self._folder / name} holds {found[0]}{list(found[1])} where {MANIFEST} promises'
    require(found == wanted, f'{wrong} {dtype}{list(shape)}: {FIX}.')
    self.finish(name, array[..., shape[-1] - 1].read())  # a copy that was stopped lacks its end
    return array


def read(places: Sequence[tuple[Documents, int]], size: int) -> tuple[np.ndarray, np.ndarray]:
  """Pieces of `size` tokens, each from its place in some documents, all read at once.

  Returns ids, int32 [N, S], and where documents begin, bool [N, S]; after the last token both are
  zero. UserError when a chunk is missing or damaged.
  """
  asked = [documents.request(int(start), size) for documents, start in places]
  values_2NS = np.zeros((2, len(asked), size), np.int32)
  for number, ((documents, _), future) in enumerate(zip(places, asked)):
    piece = documents.finish('tokens', future)
    values_2NS[:, number, : piece.shape[1]] = piece
  return values_2NS[0], values_2NS[1].astype(bool)


@functools.cache
def _context() -> ts.Context:
  """What all readers of a process share, so that their memory has one bound."""
  limits = {'gcs_request_concurrency': {'limit': REQUESTS}}
  return ts.Context({'cache_pool': {'total_bytes_limit': CACHE_BYTES}, **limits})


class Dataset:
  """Prepared domains of one tokenizer.

  Attributes:
    path, manifest: of the first of its folders.
    domains: names, sorted.
    tokenizer_hash, vocab_size: of the first folder's tokenizer; of the largest of all.
  """

  def __init__(self, path: Path | epath.Path, manifest: dict[str, Any]):
    self.path, self.manifest = path, manifest
    self.tokenizer_hash, self.vocab_size = map(manifest['tokenizer'].get, ('hash', 'vocab_size'))
    self._entries = {k: (path, v, self.vocab_size) for k, v in manifest['domains'].items()}

  @property
  def domains(self) -> tuple[str, ...]:
    return tuple(sorted(self._entries))

  def splits(self, domain: str) -> tuple[str, ...]:
    """The splits of one domain, some of 'train' and 'valid'."""
    if domain not in self._entries:
      raise UserError(f'{self.path} has no domain {domain!r}: it has {", ".join(self.domains)}.')
    return tuple(sorted(self._entries[domain][1]))

  def documents(self, domain: str, split: str) -> Documents:
    """The documents of one split; UserError when there is none, or its arrays are damaged."""
    if split not in (splits := self.splits(domain)):
      has = ', '.join(splits)
      raise UserError(f'{self.path} has no split {split!r} of the domain {domain}: it has {has}.')
    path, entries, vocab_size = self._entries[domain]
    return Documents(path / domain / split, entries[split], token_dtype(vocab_size))

  def tokenizer(self) -> Tokenizer:
    """Loads the tokenizer that the dataset was prepared with."""
    facts = self.manifest['tokenizer']
    return Tokenizer.load(self.path / facts['file'], facts['bos_token'], facts['eos_token'])

  def add(self, other: Self) -> None:
    """Takes over the domains of another dataset; UserError if ids or names would clash."""
    found = self.tokenizer().difference(other.tokenizer())
    require(
      not found, f'{other.path} was prepared with another tokenizer than {self.path} ({found}).'
    )
    twice = ', '.join(self._entries.keys() & other._entries.keys())
    require(not twice, f'{other.path} has the domain {twice}, as {self.path} has: rename one.')
    self._entries |= other._entries
    self.vocab_size = max(self.vocab_size, other.vocab_size)


def open_dataset(path: epath.PathLike) -> Dataset:
  """Opens a prepared dataset; UserError when there is none, it is damaged or of another format.

  Checks the tokenizer's hash, and each array's shape, dtype and end.
  """
  folder = folders.at(path)
  manifest = read_manifest(folder)
  file = folder / manifest['tokenizer']['file']
  found = file.exists() and hashlib.sha256(read_file(file)).hexdigest()
  if found != manifest['tokenizer']['hash']:
    raise UserError(f'{file} is missing or not the tokenizer of {MANIFEST}: {FIX}.')
  dataset = Dataset(folder, manifest)
  for domain in dataset.domains:
    for split in dataset.splits(domain):
      dataset.documents(domain, split)
  return dataset


def read_manifest(folder: Path | epath.Path) -> dict[str, Any]:
  """Parses DIR/manifest.json; UserError when it is damaged or names files outside DIR."""
  path = folder / MANIFEST
  try:
    manifest = json_file.load(path)
  except FileNotFoundError as error:
    raise UserError(
      f'{folder} is not a prepared dataset (it has no {MANIFEST}): run python -m bam_jax.prepare.'
    ) from error
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read ({error}): {FIX}.') from error
  try:
    if (version := manifest['format']) != FORMAT:
      fix = 'upgrade bam_jax' if version > FORMAT else 'prepare the dataset again'
      raise UserError(f'{path} has format {version}, and this version reads {FORMAT}: {fix}.')
    _check_manifest(manifest)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f'{path} is damaged ({error!r}): {FIX}.') from error
  return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
  facts = manifest['tokenizer']
  for key, kind in dict(vocab_size=int, bos_token=str, eos_token=str, hash=str).items():
    if not isinstance(facts[key], kind):
      raise TypeError(f'tokenizer.{key}')
  if facts['file'] not in (HUGGING_FACE_FILE, SENTENCEPIECE_FILE):
    raise ValueError(facts['file'])
  for domain, splits in manifest['domains'].items():
    for split, entry in splits.items():
      # Plain names only: a manifest must not reach outside its folder.
      for name in (domain, split):
        if not DOMAIN_NAME.fullmatch(name):
          raise ValueError(name)
      for key in SUMS:
        if not (isinstance(entry[key], int) and entry[key] > 0):
          raise TypeError(f'{domain}.{split}.{key}')
