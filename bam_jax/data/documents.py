"""Documents out of one file: JSON lines, Parquet or plain text."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bam_jax.errors import UserError

JSON_LINES = ('.jsonl', '.jsonl.gz')
PARQUET = ('.parquet',)
TEXT = ('.txt', '.txt.gz', '.md')  # one document a file
EXTENSIONS = JSON_LINES + PARQUET + TEXT


class Document(NamedTuple):
  """A text, and how many bytes of its source file had been read by its end (for progress)."""

  text: str
  position: int


def read_documents(path: Path, text_field: str = 'text') -> Iterator[Document]:
  """Yields a file's documents in order.

  JSON lines and Parquet hold one document a line or row, in `text_field`; a text file is one
  document. Texts come out exactly as they are stored. A blank JSON line holds nothing and is
  passed over; an empty text is yielded, and counting it is the caller's business.

  Raises:
    UserError: the file is missing, empty, not UTF-8, damaged or of an unknown kind; a line is not
      a JSON object, or has no string in `text_field`. The sentence names file and line.
  """
  if not path.is_file():
    raise UserError(f'{path} is not a file: mend the path.')
  kind = extension(path)
  if kind is None:
    raise UserError(f'{path} is of an unknown kind: only {", ".join(EXTENSIONS)} can be read.')
  read = _json_lines if kind in JSON_LINES else _parquet if kind in PARQUET else _text
  empty = True
  try:
    for document in read(path, text_field):
      empty = False
      yield document
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise UserError(f'{path} is damaged or cut short: {error}.') from error
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror or error}.') from error
  if empty:
    raise UserError(f'{path} is empty: it holds no document.')


def extension(path: Path) -> str | None:
  """The readable extension of a file's name, such as `.jsonl.gz`, or None."""
  return next((e for e in EXTENSIONS if path.name.lower().endswith(e)), None)


def _json_lines(path: Path, text_field: str) -> Iterator[Document]:
  with open(path, 'rb') as raw:
    for number, line in enumerate(_plain(raw, path), 1):
      if not line.strip():
        continue
      where = f'{path}, line {number}'
      try:
        record = json.loads(_utf8(line, where))
      except json.JSONDecodeError as error:
        raise UserError(f'{where} is not JSON: {error.msg} at column {error.colno}.') from error
      except RecursionError as error:
        raise UserError(f'{where} is not JSON that can be read: it is nested too deep.') from error
      if not isinstance(record, dict):
        raise UserError(f'{where} is not a JSON object such as {{"{text_field}": "..."}}.')
      yield Document(_field(record, text_field, where), raw.tell())


def _parquet(path: Path, text_field: str) -> Iterator[Document]:
  try:
    import pyarrow as pa  # slow to import, and only Parquet needs it
    from pyarrow import parquet
  except ImportError as error:
    raise UserError(f'{path} needs the package pyarrow: pip install pyarrow.') from error
  try:
    with parquet.ParquetFile(path) as file:
      names = file.schema_arrow.names
      if text_field not in names:
        raise UserError(
          f'{path} has no column {text_field!r}: choose --text_field from {", ".join(names)}.'
        )
      size, rows, row = path.stat().st_size, max(file.metadata.num_rows, 1), 0
      for batch in file.iter_batches(batch_size=256, columns=[text_field]):
        for text in batch.column(0).to_pylist():
          row += 1
          where = f'{path}, row {row}'
          yield Document(_field({text_field: text}, text_field, where), size * row // rows)
  except UnicodeDecodeError as error:
    raise UserError(f'{path}, after row {row}: {text_field!r} is not UTF-8.') from error
  except (pa.ArrowException, OSError) as error:
    raise UserError(f'{path} is not a Parquet file that can be read: {error}.') from error


def _text(path: Path, text_field: str) -> Iterator[Document]:
  del text_field
  with open(path, 'rb') as raw:
    # Line by line, so that a wrong byte's line can be named.
    lines = enumerate(_plain(raw, path), 1)
    text = ''.join(_utf8(line, f'{path}, line {number}') for number, line in lines)
    if text:
      yield Document(text, raw.tell())


def _plain(raw: BinaryIO, path: Path) -> BinaryIO:
  return gzip.open(raw) if path.name.lower().endswith('.gz') else raw


def _utf8(line: bytes, where: str) -> str:
  try:
    return line.decode()
  except UnicodeDecodeError as error:
    raise UserError(f'{where} is not UTF-8 (byte {error.start}): convert the file.') from error


def _field(record: dict, text_field: str, where: str) -> str:
  if text_field not in record:
    raise UserError(f'{where} has no field {text_field!r}: mend it, or choose --text_field.')
  text = record[text_field]
  if not isinstance(text, str):
    raise UserError(f'{where}: {text_field!r} holds {type(text).__name__}, not a string.')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{where}: {text_field!r} holds half a surrogate pair.') from error
  return text
