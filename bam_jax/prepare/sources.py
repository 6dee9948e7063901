"""What a dataset is made from: domains, their files, and the split of every document."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bam_jax.config.strict import require
from bam_jax.data.store import DOMAIN_NAME, MANIFEST
from bam_jax.data.tokenizer import HUGGING_FACE_FILE, SENTENCEPIECE_FILE
from bam_jax.prepare.documents import EXTENSIONS, extension, read_documents

SAMPLE = Path(__file__).parent / 'sample'  # the text that is shipped with bam_jax
RESERVED = (MANIFEST, HUGGING_FACE_FILE, SENTENCEPIECE_FILE)  # beside the domains
TRAIN, VALID, TEST = 'train', 'valid', 'test'

_MARKS = {
  **dict.fromkeys(['train', 'training'], TRAIN),
  **dict.fromkeys(['valid', 'validation', 'val', 'heldout', 'held_out'], VALID),
  TEST: TEST,
}
# A whole word at the start: testimony.txt is not a test set.
_MARK = re.compile(f'({"|".join(_MARKS)})(?![a-z])', re.IGNORECASE)
# The whole name: licenses.csv and notices.jsonl are data.
_ABOUT = re.compile(r'(readme|notice|licen[sc]e|copying)(\.(md|txt|rst|json))?', re.IGNORECASE)


@dataclass(frozen=True)
class Domain:
  """The files of one domain, in order, valid ones first, each with the split it is marked with.

  Where no file is valid, `valid_fraction` of the documents is held out, by a hash of the text.
  `held_out` are digests of text that must not be in train. `skipped` counts by (split, reason) what
  the latest `read` passed over: empty text, or train text that is held out.
  """

  name: str
  root: Path
  files: tuple[tuple[Path, str | None], ...]
  left_out: tuple[str, ...]
  text_field: str
  valid_fraction: float
  held_out: frozenset[bytes] = frozenset()
  skipped: collections.Counter = field(default_factory=collections.Counter)

  @classmethod
  def find(
    cls, name: str, path: Path, text_field: str, valid_fraction: float, skip_unknown: bool = False
  ) -> Self:
    """Walks a domain's file or folder; UserError when something in it cannot be read."""
    readable, left_out = find_files(path, skip_unknown)
    root = path if path.is_dir() else path.parent
    marked = [(file, find_split(file.relative_to(root))) for file in readable]
    left_out += [file for file, split in marked if split == TEST]
    # Valid first: what is held out must be known before train is read.
    files = sorted((one for one in marked if one[1] != TEST), key=lambda one: one[1] != VALID)
    require(files, f'{path} holds only test files: name those for training train*.')
    names = tuple(f'{name}/{file.relative_to(root).as_posix()}' for file in left_out)
    return cls(name, root, tuple(files), names, text_field, valid_fraction)

  @property
  def size(self) -> int:
    """Bytes of all files, as they lie on disk."""
    return sum(file.stat().st_size for file, _ in self.files)

  def sources(self) -> list[dict[str, Any]]:
    """Of every file its path inside the domain, split, bytes and sha256."""

    def one(marked: tuple[Path, str | None]) -> dict[str, Any]:
      file, split = marked
      path = f'{self.name}/{file.relative_to(self.root).as_posix()}'
      return dict(path=path, split=split, bytes=file.stat().st_size, sha256=file_hash(file))

    with concurrent.futures.ThreadPoolExecutor() as pool:
      return list(pool.map(one, self.files))

  def read(self, progress: Callable[[int], None] = lambda done: None) -> Iterator[tuple[str, str]]:
    """Yields (split, text) of every document; calls `progress` with the bytes read so far."""
    self.skipped.clear()
    has_valid, before = any(split == VALID for _, split in self.files), 0
    for file, mark in self.files:
      for text, position in read_documents(file, self.text_field):
        progress(before + position)
        digest = _digest(text)
        share = int.from_bytes(digest[:8], 'big') / 2**64
        split = (mark or TRAIN) if has_valid else VALID if share < self.valid_fraction else TRAIN
        if not text:
          self.skipped[split, 'empty'] += 1
        elif split == TRAIN and digest in self.held_out:
          self.skipped[TRAIN, 'in_valid'] += 1
        else:
          yield split, text
      before += file.stat().st_size


def hold_out(domains: Sequence[Domain]) -> list[Domain]:
  """The domains, none of which has text for train that is in a valid file of any of them."""
  held_out = frozenset(
    _digest(text)
    for domain in domains
    for file, mark in domain.files
    if mark == VALID
    for text, _ in read_documents(file, domain.text_field)
  )
  return [dataclasses.replace(domain, held_out=held_out) for domain in domains]


def file_hash(path: Path) -> str:
  """SHA-256 of a file, in hex."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _digest(text: str) -> bytes:
  return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _is_about(file: Path) -> bool:
  return bool(_ABOUT.fullmatch(file.name))


def find_files(path: Path, skip_unknown: bool = False) -> tuple[list[Path], list[Path]]:
  """The readable files of a domain's file or folder, and those left out, sorted by their path.

  Passes over names that begin with a dot, and leaves out README, LICENSE and the like without an
  extension of ours. UserError when no file can be read, one twice because of a link, or one is of
  an unknown kind, unless these are skipped.
  """
  kinds = ', '.join(EXTENSIONS)
  require(path.exists(), f'{path} does not exist: correct the path.')
  known = path.is_dir() or extension(path)
  require(known, f'{path} has an unknown file type: only {kinds} can be read.')
  files, walked = [path] if path.is_file() else [], set()
  for folder, folders, names in os.walk(path, followlinks=True):
    real = os.path.realpath(folder)
    require(real not in walked, f'{folder} is read twice because of a link: remove the link.')
    walked.add(real)
    folders[:] = [name for name in folders if not name.startswith('.')]
    files += [Path(folder, name) for name in names if not name.startswith('.')]
  files.sort(key=lambda file: file.relative_to(path).parts)
  readable = [file for file in files if extension(file)]
  for file in readable:
    # A broken link would lose data, and reading a pipe may never end.
    require(file.is_file(), f'{file} is not a file: remove it.')
    require(file.stat().st_size, f'{file} is empty: it holds no document.')
  require(readable, f'{path} holds no file that can be read: put {kinds} there.')
  left_out = [file for file in files if not extension(file)]
  fix = 'convert it, remove it, or let prepare leave out such files with --skip_unknown'
  for file in left_out:
    require(skip_unknown or _is_about(file), f'{file} is none of {kinds}: {fix}.')
  return readable, left_out


def find_split(relative: Path) -> str | None:
  """The split that a path inside a domain is marked with, if any: `validation/a.txt` is valid."""
  for part in relative.parts:
    if mark := _MARK.match(part):
      return _MARKS[mark[1].lower()]
  return None


def find_domains(inputs: Sequence[str]) -> dict[str, Path]:
  """Reads `--input`: either some `domain=path`, or one folder whose entries are the domains."""
  require(inputs, '--input is required: give --input=DOMAIN=PATH or --input=FOLDER.')
  folder, named = Path(inputs[0]), []
  if len(inputs) == 1 and folder.is_dir():
    for path in sorted(folder.iterdir()):
      if path.name.startswith('.') or path.is_file() and _is_about(path):
        continue
      kind = path.is_file() and extension(path) or ''
      name = path.name[: len(path.name) - len(kind)]
      wrong = f'{path} is a split, not a domain: give --input=DOMAIN={folder}.'
      require(not find_split(Path(name)), wrong)
      named.append((str(path), name, path))
    require(named, f'{folder} holds no domain: put a folder or file for each domain into it.')
  else:
    for given in inputs:
      require('=' in given, f'--input={given} names no domain: write --input=DOMAIN={given}.')
    named = [(f'--input={given}', *given.split('=', 1)) for given in inputs]
  domains = {}
  for given, name, path in named:
    naming = 'name it with letters, digits, "_", "-" and "."'
    plain = DOMAIN_NAME.fullmatch(name) and name not in RESERVED
    require(plain, f'{given} cannot name a domain: {naming}.')
    twice = f'{given}: the domain {name} is given twice; put both in one folder.'
    require(name not in domains, twice)
    domains[name] = Path(path)
  return domains
