"""Readers of general text. As all readers: the files of a package in, (id, text) out."""

import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from tools.corpus.text import pieces, unwrap

File = tuple[str, bytes]
Document = tuple[str, str]

# The Brown corpus writes punctuation as words of its own, and some of it twice.
_BROWN_GLUE = (
  (re.compile(r'\s+([,.;:?!%)\]}])'), r'\1'),
  (re.compile(r'([(\[{$])\s+'), r'\1'),
  (re.compile(r'``\s*'), '"'),
  (re.compile(r"\s*''"), '"'),
  (re.compile(r"\s+'s\b"), "'s"),
  (re.compile(r'([.?!;:])[ \t]*\1+(?=\s|$)'), r'\1'),
)

_CHAPTER = re.compile(r'(?m)^(?=(?:CHAPTER|Chapter) [0-9IVXLC]+)')
_NOVEL_LINES = 500  # fewer are a short story

# Of R's serialisation: https://cran.r-project.org/doc/manuals/r-release/R-ints.html
_R_HEADER = struct.Struct('>Ii')  # the type in the lowest byte of the first word; a length
_R_START = 14  # where the first object begins
_R_STRING, _R_STRINGS = 9, 16  # types: CHARSXP, and STRSXP, a vector of them
_R_LONGEST = 2**20


def state_of_the_union(files: Iterable[File]) -> Iterator[Document]:
  """One address a file."""
  for path, data in files:
    if path.startswith('package/data/') and path.endswith('.txt'):
      for i, piece in enumerate(pieces(data.decode('utf-8', 'replace'))):
        yield f'{PurePosixPath(path).stem}#{i}', piece


def moby_dick(files: Iterable[File]) -> Iterator[Document]:
  """One chapter a file."""
  for path, data in files:
    stem = PurePosixPath(path).stem
    if path.startswith('package/data/') and path.endswith('.txt'):
      if stem.startswith('chapter_') or stem == 'epilogue':
        yield stem, unwrap(data.decode('utf-8', 'replace'))


def brown(files: Iterable[File]) -> Iterator[Document]:
  """One sample a file of word/tag, a sentence a line."""
  for path, data in files:
    name = PurePosixPath(path).name
    if not re.fullmatch(r'c[a-r]\d\d', name):
      continue
    paragraphs = [[]]
    for line in data.decode('latin-1').splitlines():
      if words := line.split():
        paragraphs[-1].append(' '.join(word.rsplit('/', 1)[0] for word in words))
      elif paragraphs[-1]:
        paragraphs.append([])
    text = '\n'.join(' '.join(paragraph) for paragraph in paragraphs if paragraph)
    for pattern, replacement in _BROWN_GLUE:
      text = pattern.sub(replacement, text)
    yield name, text


def austen(files: Iterable[File]) -> Iterator[Document]:
  """The chapters of the novels, each novel a vector of lines in R's database of a package."""
  for path, data in files:
    if path.endswith('janeaustenr/data/Rdata.rdb'):
      novels = [
        lines for lines in map(_longest_strings, _objects(data)) if len(lines) >= _NOVEL_LINES
      ]
      for book, lines in enumerate(novels, 1):
        for chapter, text in enumerate(_CHAPTER.split('\n'.join(lines))[1:], 1):
          for i, piece in enumerate(pieces(unwrap(text))):
            yield f'book{book}-chapter{chapter}#{i}', piece


def _objects(data: bytes) -> Iterator[bytes]:
  """The objects in a database of R: each its length, in 4 bytes, and a zlib stream."""
  at = 0
  while at + 4 < len(data):
    stream = zlib.decompressobj()
    yield stream.decompress(data[at + 4 :])
    at = len(data) - len(stream.unused_data)


def _longest_strings(blob: bytes) -> list[str]:
  """The longest vector of strings in a serialised object, found by its looks at any depth."""
  longest, at = [], _R_START
  while at < len(blob) - _R_HEADER.size:
    strings, end = _strings(blob, at)
    if len(strings) > len(longest):
      longest = strings
    at = end or at + 1
  return longest


def _strings(blob: bytes, at: int) -> tuple[list[str], int]:
  """The vector of strings that begins at a place, and where it ends: 0 when there is none."""
  kind, count = _R_HEADER.unpack_from(blob, at)
  if kind & 0xFF != _R_STRINGS or count < 0:
    return [], 0
  strings, at = [], at + _R_HEADER.size
  for _ in range(count):
    if at + _R_HEADER.size > len(blob):
      return [], 0
    kind, size = _R_HEADER.unpack_from(blob, at)
    if kind & 0xFF != _R_STRING or size > _R_LONGEST:
      return [], 0
    at += _R_HEADER.size
    if size >= 0:  # -1 is a missing string
      strings.append(blob[at : at + size].decode('utf-8', 'replace'))
      at += size
  return strings, at
