"""Questions in a file of JSON lines, a row each, for machines without a network.

The keys of the first row say what all rows are:
  context, choices, answer: the likeliest of some texts; `answer` is its number, from 0.
  context, answer: text that is written; `answer` is the line to write, or a list of such lines.
  prompt, test, entry_point: a function that is written after `prompt`, as HumanEval's are; `test`
    defines `check(candidate)`.
Other keys are left alone. The file may be compressed: .gz.
"""

import gzip
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from bam_jax.errors import UserError
from bam_jax.files import json_file

SUFFIXES = ('.jsonl', '.jsonl.gz')
MOST_BYTES = 2**28  # of a file's text
CHOICE, LINE, CODE = 'choice', 'line', 'code'  # kinds


class Questions(NamedTuple):
  """The rows of a file."""

  name: str  # of the file, without its ending
  kind: str  # CHOICE, LINE or CODE
  rows: list[dict[str, Any]]  # with the keys of the kind, no others


def is_file(task: str) -> bool:
  """Whether what was asked for is a file, and not a task's name."""
  return task.endswith(SUFFIXES)


def read(path: str) -> Questions:
  """Reads a file; UserError when it cannot be read, or a row of it."""
  try:
    with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as file:
      content = file.read(MOST_BYTES + 1)
  except (OSError, EOFError, zlib.error, ValueError) as error:
    why = getattr(error, 'strerror', None) or error
    raise UserError(f'--tasks={path} cannot be read: {why}.') from error
  if len(content) > MOST_BYTES:
    raise UserError(f'--tasks={path} is larger than {MOST_BYTES >> 20} MiB: split the file.')
  rows: list[dict[str, Any]] = []
  kind = ''
  for number, line in enumerate(content.split(b'\n'), 1):
    if line.strip():
      try:
        row = json_file.loads(line.decode())
      except ValueError as error:
        raise UserError(f'{path}:{number} is not JSON ({error}).') from None
      kind = kind or _kind(row)
      rows.append(_check(row, kind, f'{path}:{number}'))
  if not rows:
    raise UserError(f'--tasks={path} holds no question.')
  name = Path(path).name.removesuffix('.gz').removesuffix('.jsonl')
  return Questions(name, kind, rows)


def _kind(row: Any) -> str:
  if isinstance(row, dict) and 'test' in row:
    return CODE
  return CHOICE if isinstance(row, dict) and 'choices' in row else LINE


def _check(row: Any, kind: str, where: str) -> dict[str, Any]:
  """What a row of this kind says."""
  row = row if isinstance(row, dict) else {}
  if kind == CODE:
    return {key: _text(row, key, where) for key in ('prompt', 'test', 'entry_point')}
  context, answer = _text(row, 'context', where), row.get('answer')
  if kind == LINE:
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(isinstance(one, str) and one.strip() for one in answers):
      raise UserError(f'{where} has no text, and no list of texts, under the key "answer".')
    return {'context': context, 'answer': answers}
  choices = row.get('choices')
  texts = isinstance(choices, list) and all(isinstance(one, str) and one for one in choices)
  if not texts or len(choices) < 2:
    raise UserError(f'{where} has no list of two texts or more under the key "choices".')
  if type(answer) is not int or not 0 <= answer < len(choices):
    raise UserError(f'{where} has no number of a choice, from 0, under the key "answer".')
  return {'context': context, 'choices': choices, 'answer': answer}


def _text(row: dict[str, Any], key: str, where: str) -> str:
  if not isinstance(row.get(key), str):
    raise UserError(f'{where} has no text under the key "{key}".')
  return row[key]
