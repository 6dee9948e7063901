"""Documents out of one file: JSON lines, Parquet or plain text."""

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bam_jax.errors import UserError
from bam_jax.files import json_file

JSON_LINES = ('.jsonl', '.jsonl.gz')
PARQUET = ('.parquet',)
TEXT = ('.txt', '.txt.gz', '.md')  # one document a file
EXTENSIONS = JSON_LINES + PARQUET + TEXT
# At most, of a text: a small gzipped file may unpack to any memory's worth, and a tokenizer takes
# 100 times a text's bytes, 200 of one whose words are letters.
DOCUMENT_BYTES = 2**24
# Of a line of JSON, beside what its strings hold: "{}," takes 24 times its bytes of memory.
SYNTAX_BYTES = 2**22
ROWS, ROWS_BYTES = 256, 2**28  # of Parquet, read at a time, at most
# Of Parquet, unpacked: a row group may be one page, which is unpacked whole. Text that packs like
# all other text comes in pages of 1 MiB.
GROUP_BYTES, PACKED = 2**29, 100
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


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
      a JSON object, or has no string in `text_field`; a document is larger than DOCUMENT_BYTES.
      The sentence names file and line.
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
    for number, line in _lines(raw, path):
      if not line.strip():
        continue
      where = f'{path}, line {number}'
      if len(line) > SYNTAX_BYTES and _has_much_syntax(line):
        raise UserError(f'{where} is not a text with a few facts: put one document on each line.')
      try:
        record = json_file.loads(_utf8(line, where))
      except json.JSONDecodeError as error:
        raise UserError(f'{where} is not JSON: {error.msg} at column {error.colno}.') from error
      except ValueError as error:
        raise UserError(f'{where} is not JSON that can be read: {error}.') from error
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
      for group in range(file.metadata.num_row_groups):
        most = _most_rows(file.metadata.row_group(group), text_field, path)
        for batch in file.iter_batches(most, [group], [text_field]):
          for text in batch.column(0).to_pylist():
            row += 1
            where = f'{path}, row {row}'
            yield Document(_field({text_field: text}, text_field, where), size * row // rows)
  except UnicodeDecodeError as error:
    raise UserError(f'{path}, after row {row}: {text_field!r} is not UTF-8.') from error
  except (pa.ArrowException, OSError) as error:
    raise UserError(f'{path} is not a Parquet file that can be read: {error}.') from error


def _most_rows(group: Any, text_field: str, path: Path) -> int:
  """How many rows of a Parquet file's group to read at a time; UserError for one to fill memory.

  A dictionary has a text once for many rows, and that one may be all there is.
  """
  columns = (group.column(number) for number in range(group.num_columns))
  size = 1
  for column in (column for column in columns if column.path_in_schema == text_field):
    size = max(size, column.total_uncompressed_size)
    if size > max(GROUP_BYTES, PACKED * column.total_compressed_size):
      raise UserError(
        f'{path} unpacks to {size >> 20} MiB in one row group, over {PACKED} times what it takes: '
        'write it with fewer rows in a group.'
      )
  return max(1, min(ROWS, ROWS_BYTES // size))


def _has_much_syntax(line: bytes) -> bool:
  """Whether a line has over SYNTAX_BYTES outside its strings, each of which counts as two."""
  outside, end = 0, 0
  for string in _STRING.finditer(line):
    outside, end = outside + string.start() - end + 2, string.end()
    if outside > SYNTAX_BYTES:
      return True
  return outside + len(line) - end > SYNTAX_BYTES


def _text(path: Path, text_field: str) -> Iterator[Document]:
  del text_field
  with open(path, 'rb') as raw:
    content = _plain(raw, path).read(DOCUMENT_BYTES + 1)
    if len(content) > DOCUMENT_BYTES:
      raise _too_large(str(path))
    try:
      text = content.decode()
    except UnicodeDecodeError as error:
      number = content.count(b'\n', 0, error.start) + 1
      begin = content.rfind(b'\n', 0, error.start) + 1
      raise _not_utf8(f'{path}, line {number}', error.start - begin) from error
    if text:
      yield Document(text, raw.tell())


def _plain(raw: BinaryIO, path: Path) -> BinaryIO:
  return gzip.open(raw) if path.name.lower().endswith('.gz') else raw


def _lines(raw: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
  """The numbered lines of a file, unpacked."""
  plain = _plain(raw, path)
  for number in itertools.count(1):
    line = plain.readline(DOCUMENT_BYTES + 1)
    if not line:
      return
    if len(line) > DOCUMENT_BYTES:
      raise _too_large(f'{path}, line {number}')
    yield number, line


def _too_large(where: str) -> UserError:
  return UserError(f'{where} is larger than {DOCUMENT_BYTES >> 20} MiB: cut it into documents.')


def _utf8(line: bytes, where: str) -> str:
  try:
    return line.decode()
  except UnicodeDecodeError as error:
    raise _not_utf8(where, error.start) from error


def _not_utf8(where: str, byte: int) -> UserError:
  return UserError(f'{where} is not UTF-8 (byte {byte}): convert the file.')


def _field(record: dict, text_field: str, where: str) -> str:
  if text_field not in record:
    raise UserError(f'{where} has no field {text_field!r}: mend it, or choose --text_field.')
  text = record[text_field]
  if not isinstance(text, str):
    raise UserError(f'{where}: {text_field!r} holds {type(text).__name__}, not a string.')
  try:
    size = len(text.encode())
  except UnicodeEncodeError as error:
    raise UserError(f'{where}: {text_field!r} holds half a surrogate pair.') from error
  if size > DOCUMENT_BYTES:
    raise _too_large(where)
  return text
