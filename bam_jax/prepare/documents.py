"""Documents out of one file: JSON lines, Parquet or plain text."""

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bam_jax.config.strict import require
from bam_jax.errors import UserError
from bam_jax.files import json_file

JSON_LINES = ('.jsonl', '.jsonl.gz', '.jsonl.zst')
PARQUET = '.parquet'
TEXT = ('.txt', '.txt.gz', '.txt.zst', '.md')  # one document a file
EXTENSIONS = (*JSON_LINES, PARQUET, *TEXT)
DOCUMENT_BYTES = 2**24  # at most: a tokenizer takes 100 times a text's bytes
ROWS = 64  # of Parquet, read at a time


class Document(NamedTuple):
  """A text, and how many bytes of its source file had been read by its end (for progress)."""

  text: str
  position: int


def read_documents(path: Path, text_field: str = 'text') -> Iterator[Document]:
  """Yields the documents, in order, of a file of one of the EXTENSIONS.

  JSON lines and Parquet hold one document a line or row, in `text_field`; a text file is one
  document. Texts come out exactly as they are stored, without a leading byte-order mark. A blank
  JSON line is passed over; an empty text is yielded, for the caller to count.

  A UserError names file and line: missing, not UTF-8, damaged, not a JSON object, without a string
  in `text_field`, or a document larger than DOCUMENT_BYTES.
  """
  kind = extension(path)
  try:
    yield from _parquet(path, text_field) if kind == PARQUET else _plain(path, kind, text_field)
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise UserError(f'{path} is damaged or cut short: {error}.') from error
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror or error}.') from error


def extension(path: Path) -> str | None:
  """The readable extension of a file's name, such as `.jsonl.gz`, or None."""
  return next((e for e in EXTENSIONS if path.name.lower().endswith(e)), None)


def _plain(path: Path, kind: str, text_field: str) -> Iterator[Document]:
  with open(path, 'rb') as raw:
    plain = gzip.open(raw) if kind.endswith('.gz') else raw
    if kind.endswith('.zst'):
      import pyarrow  # slow to import

      plain = io.BufferedReader(pyarrow.input_stream(raw, compression='zstd'))
    if kind in TEXT:
      yield Document(_decoded(plain.read(DOCUMENT_BYTES + 1), path), raw.tell())
      return
    for number, line in enumerate(iter(lambda: plain.readline(DOCUMENT_BYTES + 1), b''), 1):
      where = f'{path}, line {number}'
      line = _decoded(line, path, number)
      if not line.strip():
        continue
      try:
        record = json_file.loads(line)
      except ValueError as error:
        raise UserError(f'{where} is not JSON: {error}.') from error
      wrong = f'{where} is not a JSON object such as {{"{text_field}": "..."}}.'
      require(isinstance(record, dict), wrong)
      wrong = f'{where} has no field {text_field!r}: add it, or choose --text_field.'
      require(text_field in record, wrong)
      yield Document(_checked(record[text_field], text_field, where), raw.tell())


def _parquet(path: Path, text_field: str) -> Iterator[Document]:
  import pyarrow as pa  # slow to import, and only Parquet needs it
  from pyarrow import parquet

  row = 0
  try:
    with parquet.ParquetFile(path) as file:
      names = file.schema_arrow.names
      wrong = f'{path} has no column {text_field!r}: choose --text_field from {", ".join(names)}.'
      require(text_field in names, wrong)
      size, rows = path.stat().st_size, max(file.metadata.num_rows, 1)
      for batch in file.iter_batches(ROWS, columns=[text_field]):
        for text in batch.column(0).to_pylist():
          row += 1
          yield Document(_checked(text, text_field, f'{path}, row {row}'), size * row // rows)
  except UnicodeDecodeError as error:
    raise UserError(f'{path}, after row {row}: {text_field!r} is not UTF-8.') from error
  except (pa.ArrowException, OSError) as error:
    raise UserError(f'{path} is not a Parquet file: {error}.') from error


def _decoded(content: bytes, path: Path, line: int | None = None) -> str:
  """The text of one line of a file, or of all of it."""
  _check_size(len(content), f'{path}, line {line}' if line else str(path))
  if line in (None, 1):
    content = content.removeprefix(codecs.BOM_UTF8)
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    line = line or content.count(b'\n', 0, error.start) + 1
    byte = error.start - (content.rfind(b'\n', 0, error.start) + 1)
    raise UserError(f'{path}, line {line} is not UTF-8 (byte {byte}): convert the file.') from error


def _checked(text: object, text_field: str, where: str) -> str:
  wrong = f'{where}: {text_field!r} holds {type(text).__name__}, not a string.'
  require(isinstance(text, str), wrong)
  try:
    _check_size(len(text.encode()), where)
  except UnicodeEncodeError as error:
    raise UserError(f'{where}: {text_field!r} contains an unpaired surrogate.') from error
  return text


def _check_size(size: int, where: str) -> None:
  wrong = f'{where} is larger than {DOCUMENT_BYTES >> 20} MiB: split it into several documents.'
  require(size <= DOCUMENT_BYTES, wrong)
