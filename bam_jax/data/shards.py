"""A prepared dataset on disk: token shards under one manifest.

```
DIR/manifest.json                                what is here, and what it was made from
DIR/tokenizer.json (or tokenizer.model)          the tokenizer, unchanged
DIR/<domain>/<split>-00000-of-00003.tokens.npy   uint16 or uint32: bos, tokens, eos, bos, ...
DIR/<domain>/<split>-00000-of-00003.ends.npy     int64: where each document ends, exclusive
DIR/<domain>/<split>-00000-of-00003.bytes.npy    int64: the UTF-8 bytes of each document's text
```
A document never spans two shards.
"""

import bisect
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bam_jax.data import columns
from bam_jax.data.tokenizer import HUGGING_FACE_FILE, SENTENCEPIECE_FILE, Tokenizer, read_file
from bam_jax.errors import UserError
from bam_jax.files import json_file

FORMAT = 1
MANIFEST = 'manifest.json'
DOMAIN_NAME = re.compile(r'[A-Za-z0-9][\w.-]*', re.ASCII)  # also of splits and shards
PARTS = ('tokens', 'ends', 'bytes')
OPEN_FILES = 16  # of a split that stay open


class Encoded(NamedTuple):
  """Some documents' tokens, end to end, and for each its length and its text's UTF-8 bytes."""

  tokens: np.ndarray
  lengths: np.ndarray
  byte_counts: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
  """The narrowest of uint16 and uint32 that holds every id."""
  return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class Documents:
  """The documents of one split of one domain, over all its shards.

  A random-access sequence that holds only paths and sizes until it is read, so that it is cheap
  to pickle into worker processes; each process opens the shards anew.
  """

  def __init__(self, folder: Path, shards: Sequence[dict[str, Any]], dtype: np.dtype):
    """Checks the shards' files against the manifest's numbers, without reading their tokens.

    Args:
      folder: the domain's folder.
      shards: the manifest's entries: `name`, `documents`, `tokens`.
      dtype: of the tokens.

    Raises:
      UserError: a file is missing, cut short, of another dtype, or of another size.
    """
    self._folder, self._shards, self._dtype = folder, tuple(shards), np.dtype(dtype)
    # _first[s] is the index of shard s's first document; one more entry closes the list.
    self._first = np.cumsum([0, *(shard['documents'] for shard in shards)]).tolist()
    self.num_tokens = sum(shard['tokens'] for shard in shards)
    self._columns = [self._check(shard) for shard in self._shards]

  def __len__(self) -> int:
    return self._first[-1]

  def __getitem__(self, index: int) -> np.ndarray:
    """The tokens of one document, read-only, in the stored dtype."""
    column, start, stop = self._locate(index)
    return column.read(self._opened(column.path), start, stop)

  def __repr__(self) -> str:
    names = [shard['name'] for shard in self._shards]
    return f'Documents({str(self._folder)!r}, {names}, documents={len(self)})'

  def __getstate__(self) -> dict[str, Any]:
    kept = ('_folder', '_shards', '_dtype', '_first', 'num_tokens', '_columns')
    return {name: self.__dict__[name] for name in kept}

  def read(self, index: int, start: int, stop: int) -> np.ndarray:
    """Tokens `start` to `stop` (exclusive) of one document, read-only.

    Raises:
      IndexError: there is no such document, or it does not reach from `start` to `stop`.
      UserError: the file is gone, or has become shorter.
    """
    column, first, last = self._locate(index)
    if not 0 <= start <= stop <= last - first:
      raise IndexError(f'tokens {start}:{stop} of document {index}, which has {last - first}')
    return column.read(self._opened(column.path), first + start, first + stop)

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """Tokens of every document, begin and end included: int64 [documents]."""
    lengths = [np.diff(ends, prepend=0) for ends in self._whole('ends')]
    return np.concatenate([np.zeros(0, np.int64), *lengths])

  @functools.cached_property
  def byte_counts(self) -> np.ndarray:
    """UTF-8 bytes of every document's text: int64 [documents]."""
    return np.concatenate([np.zeros(0, np.int64), *self._whole('bytes')])

  @functools.cached_property
  def _opened(self) -> Callable[[str], columns.Descriptor]:
    return functools.lru_cache(OPEN_FILES)(columns.open_file)

  def _whole(self, part: str) -> Iterator[np.ndarray]:
    for shard, files in zip(self._shards, self._columns):
      column = files[part]
      yield column.read(columns.open_file(column.path), 0, shard['documents'])

  def _locate(self, index: int) -> tuple[columns.Column, int, int]:
    """The file of a document's tokens, and where in it they begin and end."""
    if not 0 <= index < len(self):
      raise IndexError(f'document {index} of {len(self)}')
    shard = bisect.bisect_right(self._first, index) - 1
    within, files = index - self._first[shard], self._columns[shard]
    ends = files['ends']
    bounds = ends.read(self._opened(ends.path), max(within - 1, 0), within + 1).tolist()
    return files['tokens'], bounds[0] if within else 0, bounds[-1]

  def _check(self, shard: dict[str, Any]) -> dict[str, columns.Column]:
    """A shard's files, once they are what the manifest says."""
    wanted = {
      'tokens': (self._dtype, shard['tokens']),
      'ends': (np.dtype(np.int64), shard['documents']),
      'bytes': (np.dtype(np.int64), shard['documents']),
    }
    found = {}
    for part, (dtype, size) in wanted.items():
      path = str(self._folder / f'{shard["name"]}.{part}.npy')
      found[part] = columns.open_column(path, dtype, size)
    ends = found['ends'].read(columns.open_file(found['ends'].path), 0, shard['documents'])
    if ends[-1] != shard['tokens'] or np.any(np.diff(ends, prepend=0) <= 0):
      raise UserError(
        f'{found["ends"].path} does not divide {shard["tokens"]} tokens into documents: prepare '
        'the dataset anew.'
      )
    return found


class Dataset:
  """A prepared dataset: its manifest, its tokenizer, and the documents of each domain's splits.

  Attributes:
    path: the folder.
    manifest: the parsed manifest.json.
    domains: the domains' names, sorted.
    tokenizer_hash: SHA-256 of the tokenizer's file, in hex.
  """

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
    """The documents of one split.

    Raises:
      UserError: there is no such domain or split, or its files do not fit the manifest.
    """
    splits = self.splits(domain)
    if split not in splits:
      raise UserError(
        f'{self.path} has no split {split!r} of the domain {domain}: it has {", ".join(splits)}.'
      )
    shards = self.manifest['domains'][domain][split]['shards']
    dtype = token_dtype(self.manifest['tokenizer']['vocab_size'])
    return Documents(self.path / domain, shards, dtype)

  def tokenizer(self) -> Tokenizer:
    """Loads the tokenizer that the dataset was prepared with."""
    facts = self.manifest['tokenizer']
    return Tokenizer.load(self.path / facts['file'], facts['bos_token'], facts['eos_token'])

  def verify(self) -> None:
    """Reads every file and compares it with its checksum.

    Raises:
      UserError: a file is not what `prepare` wrote.
    """
    for domain in self.domains:
      for split in self.splits(domain):
        for shard in self.manifest['domains'][domain][split]['shards']:
          for part, expected in shard['sha256'].items():
            path = self.path / domain / f'{shard["name"]}.{part}.npy'
            if file_hash(path) != expected:
              raise UserError(f'{path} has changed since it was written: prepare the dataset anew.')


def open_dataset(path: str | os.PathLike) -> Dataset:
  """Opens a prepared dataset and checks that its files fit its manifest.

  Checks names, sizes, dtypes and the tokenizer's hash, and reads no tokens; `Dataset.verify`
  compares the checksums of everything.

  Raises:
    UserError: there is no dataset, or it is damaged, or of a newer format. The sentence names the
      file.
  """
  folder = Path(path)
  manifest = read_manifest(folder)
  facts = manifest['tokenizer']
  file = folder / facts['file']
  if not file.is_file() or hashlib.sha256(read_file(file)).hexdigest() != facts['hash']:
    raise UserError(f'{file} is missing or not the tokenizer of {MANIFEST}: prepare anew.')
  dataset = Dataset(folder, manifest)
  for domain in dataset.domains:
    for split in dataset.splits(domain):
      dataset.documents(domain, split)
  return dataset


def read_manifest(folder: Path) -> dict[str, Any]:
  """Parses and checks DIR/manifest.json.

  Raises:
    UserError: it is missing, no manifest, of a newer format, or names files outside DIR.
  """
  path = folder / MANIFEST
  try:
    manifest = json_file.load(path)
  except FileNotFoundError as error:
    raise UserError(
      f'{folder} is no prepared dataset (it has no {MANIFEST}): run python -m bam_jax.prepare.'
    ) from error
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read ({error}): prepare the dataset anew.') from error
  version = manifest.get('format') if isinstance(manifest, dict) else None
  if not isinstance(version, int):
    raise UserError(f'{path} is no manifest of a prepared dataset: prepare the dataset anew.')
  if version > FORMAT:
    raise UserError(f'{path} has format {version}, newer than {FORMAT}: upgrade bam_jax.')
  try:
    _check_manifest(manifest)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f'{path} is damaged ({error!r}): prepare the dataset anew.') from error
  return manifest


def write_split(
  folder: Path, split: str, pieces: Iterable[Encoded], dtype: np.dtype, shard_tokens: int
) -> list[dict[str, Any]]:
  """Writes documents as shards of at most `shard_tokens` tokens, or of one longer document.

  Args:
    folder: the domain's folder, which exists.
    split: 'train' or 'valid'.
    pieces: the documents, in order; pieces may be of any size, the shards do not depend on it.
    dtype: of the stored tokens.
    shard_tokens: the most tokens of a shard.

  Returns:
    The manifest's entries: name, documents, tokens, bytes and sha256 of each shard.
  """
  shards = []
  for index, shard in enumerate(_pack(pieces, shard_tokens)):
    arrays = (shard.tokens.astype(dtype), np.cumsum(shard.lengths), shard.byte_counts)
    for part, array in zip(PARTS, arrays):
      np.save(folder / f'{split}-{index:05}.{part}.npy', array)
    sizes = (len(shard.lengths), len(shard.tokens), int(shard.byte_counts.sum()))
    shards.append(dict(zip(('documents', 'tokens', 'bytes'), sizes), sha256={}))
  for index, shard in enumerate(shards):
    shard['name'] = f'{split}-{index:05}-of-{len(shards):05}'
    for part in PARTS:
      path = folder / f'{shard["name"]}.{part}.npy'
      (folder / f'{split}-{index:05}.{part}.npy').rename(path)
      shard['sha256'][part] = file_hash(path)
  return shards


def file_hash(path: Path) -> str:
  """SHA-256 of a file, in hex."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _pack(pieces: Iterable[Encoded], shard_tokens: int) -> Iterator[Encoded]:
  held: list[Encoded] = []
  room = shard_tokens
  for piece in pieces:
    ends = np.cumsum(piece.lengths)
    first = start = 0
    while first < len(ends):
      # The documents that still fit; one that is longer than a shard gets a shard to itself.
      last = int(np.searchsorted(ends, start + room, 'right'))
      if last == first and not held:
        last = first + 1
      if last > first:
        stop = int(ends[last - 1])
        counts = piece.byte_counts[first:last]
        held.append(Encoded(piece.tokens[start:stop], piece.lengths[first:last], counts))
        room, first, start = room - (stop - start), last, stop
      if first < len(ends):
        yield Encoded(*(np.concatenate(part) for part in zip(*held)))
        held, room = [], shard_tokens
  if held:
    yield Encoded(*(np.concatenate(part) for part in zip(*held)))


def _check_manifest(manifest: dict[str, Any]) -> None:
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
        if not all(
          isinstance(shard[key], int) and shard[key] > 0 for key in ('documents', 'tokens')
        ):
          raise TypeError(shard['name'])
