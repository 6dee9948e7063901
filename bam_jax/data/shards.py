"""A prepared dataset on disk: token shards under one manifest.

```
DIR/manifest.json                                what is here, and what it was made from
DIR/tokenizer.json (or tokenizer.model)          the tokenizer, unchanged
DIR/<domain>/<split>-00000-of-00003.tokens.npy   uint16 or uint32: BOS, tokens, EOS, BOS, ...
DIR/<domain>/<split>-00000-of-00003.ends.npy     int64: where each document ends, exclusive
DIR/<domain>/<split>-00000-of-00003.bytes.npy    int64: the UTF-8 bytes of each document's text
```
A document never spans two shards.
"""

import functools
import hashlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from bam_jax.data.tokenizer import HUGGING_FACE_FILE, SENTENCEPIECE_FILE, Tokenizer, read_file
from bam_jax.errors import UserError
from bam_jax.files import folders, json_file

FORMAT = 1
MANIFEST = 'manifest.json'
DOMAIN_NAME = re.compile(r'[A-Za-z0-9][\w.-]*', re.ASCII)  # also of splits and shards
PARTS = ('tokens', 'ends', 'bytes')
FIX = 'prepare the dataset again'


def token_dtype(vocab_size: int) -> np.dtype:
  """The narrowest of uint16 and uint32 that holds every id."""
  return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class Documents:
  """The documents of one split of one domain, over all its shards: a random-access sequence.

  Attributes:
    lengths: tokens of every document, BOS and EOS included: int64 [documents].
    num_tokens: of all documents.
  """

  def __init__(self, folder: Path, shards: Sequence[dict[str, Any]], dtype: np.dtype):
    """Checks the files in `folder` against the manifest's `shards`; UserError if they differ."""
    self.num_tokens, self._dtype = sum(shard['tokens'] for shard in shards), np.dtype(dtype)
    self._tokens, self._bytes, ends = [], [], []
    for shard in shards:
      path, count, tokens = str(folder / shard['name']), shard['documents'], shard['tokens']
      offset = _map(f'{path}.tokens.npy', self._dtype, tokens).offset
      self._tokens.append((f'{path}.tokens.npy', offset))
      self._bytes.append((f'{path}.bytes.npy', np.dtype(np.int64), count))
      _map(*self._bytes[-1])
      ends.append(np.array(_map(f'{path}.ends.npy', np.dtype(np.int64), count)))
      if ends[-1][-1] != tokens or np.any(np.diff(ends[-1], prepend=0) <= 0):
        raise UserError(f'{path}.ends.npy does not divide {tokens} tokens into documents: {FIX}.')
    empty = np.zeros(0, np.int64)
    self.lengths = np.concatenate([empty, *(np.diff(part, prepend=0) for part in ends)])
    self._ends = np.concatenate([empty, *ends])  # each in its own shard
    self._first = np.cumsum([0, *map(len, ends)])  # of each shard's documents

  def __len__(self) -> int:
    return len(self.lengths)

  def __getitem__(self, index: int) -> np.ndarray:
    """The tokens of one document, in the stored dtype."""
    return self.read(index, 0, int(self.lengths[index]))

  def read(self, index: int, start: int, stop: int) -> np.ndarray:
    """Tokens `start` to `stop` (exclusive) of one document; IndexError when it lacks them."""
    if not (0 <= index < len(self) and 0 <= start <= stop <= self.lengths[index]):
      raise IndexError(f'tokens {start}:{stop} of document {index}')
    shard = int(np.searchsorted(self._first, index, side='right')) - 1
    path, offset = self._tokens[shard]
    offset += self._dtype.itemsize * int(self._ends[index] - self.lengths[index] + start)
    # Not mapped: a mapped file that shrinks kills its reader.
    tokens = np.fromfile(path, self._dtype, stop - start, offset=offset)
    if len(tokens) < stop - start:
      raise UserError(f'{path} has been cut short since it was opened: {FIX}.')
    return tokens

  @functools.cached_property
  def byte_counts(self) -> np.ndarray:
    """UTF-8 bytes of every document's text: int64 [documents]."""
    return np.concatenate([np.zeros(0, np.int64), *(_map(*file) for file in self._bytes)])


class Dataset:
  """A prepared dataset: its folder, manifest, domains (sorted), tokenizer, and documents."""

  def __init__(self, path: Path, manifest: dict[str, Any]):
    self.path, self.manifest = path, manifest
    self.domains = tuple(sorted(manifest['domains']))
    self.tokenizer_hash: str = manifest['tokenizer']['hash']

  def splits(self, domain: str) -> tuple[str, ...]:
    """The splits of one domain, some of 'train' and 'valid'."""
    if domain not in self.domains:
      raise UserError(f'{self.path} has no domain {domain!r}: it has {", ".join(self.domains)}.')
    return tuple(sorted(self.manifest['domains'][domain]))

  def documents(self, domain: str, split: str) -> Documents:
    """The documents of one split; UserError when there is none, or its files are damaged."""
    if split not in (splits := self.splits(domain)):
      has = ', '.join(splits)
      raise UserError(f'{self.path} has no split {split!r} of the domain {domain}: it has {has}.')
    shards = self.manifest['domains'][domain][split]['shards']
    dtype = token_dtype(self.manifest['tokenizer']['vocab_size'])
    return Documents(self.path / domain, shards, dtype)

  def tokenizer(self) -> Tokenizer:
    """Loads the tokenizer that the dataset was prepared with."""
    facts = self.manifest['tokenizer']
    return Tokenizer.load(self.path / facts['file'], facts['bos_token'], facts['eos_token'])

  def verify(self) -> None:
    """Compares every file with its checksum; UserError when one is not what `prepare` wrote."""
    for name, expected in checksums(self.manifest).items():
      if file_hash(self.path / name) != expected:
        raise UserError(f'{self.path / name} has changed since it was written: {FIX}.')


def open_dataset(path: str | os.PathLike) -> Dataset:
  """Opens a prepared dataset; UserError when there is none, it is damaged or of a newer format.

  Checks names, sizes, dtypes and the tokenizer's hash, but reads no tokens, as `verify` does.
  """
  folder = Path(path)
  manifest = read_manifest(folder)
  file = folder / manifest['tokenizer']['file']
  found = file.is_file() and hashlib.sha256(read_file(file)).hexdigest()
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
    if (version := manifest['format']) > FORMAT:
      raise UserError(f'{path} has format {version}, newer than {FORMAT}: upgrade bam_jax.')
    _check_manifest(manifest)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f'{path} is damaged ({error!r}): {FIX}.') from error
  return manifest


def checksums(manifest: dict[str, Any]) -> dict[str, str]:
  """SHA-256 of every file of a dataset, by its path in the folder; not of the manifest."""
  return {manifest['tokenizer']['file']: manifest['tokenizer']['hash']} | {
    f'{domain}/{shard["name"]}.{part}.npy': shard['sha256'][part]
    for domain, splits in manifest['domains'].items()
    for entry in splits.values()
    for shard in entry['shards']
    for part in PARTS
  }


def write(path: Path, documents: Sequence[np.ndarray], byte_counts: Sequence[int]) -> None:
  """Writes a shard at `path`: the tokens of its documents, and the UTF-8 bytes of their texts."""
  ends = np.cumsum([len(ids) for ids in documents], dtype=np.int64)
  arrays = np.concatenate(documents), ends, np.array(byte_counts, np.int64)
  for part, array in zip(PARTS, arrays):
    np.save(content := io.BytesIO(), array)
    folders.write_file(f'{path}.{part}.npy', content.getvalue())


def is_written(path: Path) -> bool:
  """Whether all of a shard's files are there, since its last one is."""
  return Path(f'{path}.{PARTS[-1]}.npy').exists()


def move_split(source: Path, split: str, target: Path) -> list[dict[str, Any]]:
  """Moves a split's shards between two folders; returns the manifest's entries.

  Each has its name, documents, tokens, bytes and sha256.
  """
  last, shards = f'.{PARTS[-1]}.npy', []
  names = sorted(path.name.removesuffix(last) for path in source.glob(f'{split}-*{last}'))
  for name in names:
    files = {part: source / f'{name}.{part}.npy' for part in PARTS}
    ends, byte_counts = np.load(files['ends']), np.load(files['bytes'])
    shard = dict(documents=len(ends), tokens=int(ends[-1]), bytes=int(byte_counts.sum()))
    shard['name'] = f'{name}-of-{len(names):05}'
    shard['sha256'] = {part: file_hash(file) for part, file in files.items()}
    for part in reversed(PARTS):  # a shard of which some files have moved is not `is_written`
      files[part].rename(target / f'{shard["name"]}.{part}.npy')
    shards.append(shard)
  return shards


def file_hash(path: Path) -> str:
  """SHA-256 of a file, in hex."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _map(path: str, dtype: np.dtype, size: int) -> np.memmap:
  """The values of a .npy file; UserError when it does not hold `size` of them, of that dtype."""
  try:
    array = np.load(path, mmap_mode='r')  # reads the header, and compares sizes
  except FileNotFoundError as error:
    raise UserError(f'{path} is missing: {FIX}.') from error
  except (OSError, ValueError, TypeError, EOFError, OverflowError) as error:
    raise UserError(f'{path} is cut short or not an array: {FIX}.') from error
  found, shape = getattr(array, 'dtype', None), getattr(array, 'shape', ())
  if found != dtype or shape != (size,):
    raise UserError(
      f'{path} holds {found}{list(shape)} where the manifest promises {dtype}[{size}]: {FIX}.'
    )
  return array


def _check_manifest(manifest: dict[str, Any]) -> None:
  checksums(manifest)  # are all there
  facts = manifest['tokenizer']
  for key, kind in dict(vocab_size=int, bos_id=int, eos_id=int, hash=str).items():
    if not isinstance(facts[key], kind):
      raise TypeError(f'tokenizer.{key}')
  if facts['file'] not in (HUGGING_FACE_FILE, SENTENCEPIECE_FILE):
    raise ValueError(facts['file'])
  for domain, splits in manifest['domains'].items():
    for split, entry in splits.items():
      for shard in entry['shards']:
        # Plain names only: a manifest must not reach outside its folder.
        for name in (domain, split, shard['name']):
          if not DOMAIN_NAME.fullmatch(name):
            raise ValueError(name)
        for key in ('documents', 'tokens'):
          if not (isinstance(shard[key], int) and shard[key] > 0):
            raise TypeError(f'{shard["name"]}: {key}')
