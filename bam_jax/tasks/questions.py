"""Files of questions as tasks of lm-eval, for machines without a network.

A file has one JSON object a line. The keys of the first one say what kind all of them are:
  context, choices, answer: multiple choice; `answer` is the index of the correct choice, from 0.
  context, answer: a line to write; `answer` is that line, or a list of accepted lines.
  prompt, test, entry_point: a function that continues `prompt`, as in HumanEval; `test` defines
    `check(candidate)`.
Other keys are ignored. The file may be compressed: .gz.
"""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bam_jax.config.strict import require
from bam_jax.errors import UserError
from bam_jax.files import json_file
from bam_jax.tasks import scoring

SUFFIXES = ('.jsonl', '.jsonl.gz')
CHOICE, LINE, CODE = 'choice', 'line', 'code'  # kinds
KEYS = {
  CHOICE: ('context', 'choices', 'answer'),
  LINE: ('context', 'answer'),
  CODE: ('prompt', 'test', 'entry_point'),
}


class Questions(NamedTuple):
  """The questions of one file."""

  name: str  # of the file, without its suffix
  kind: str  # CHOICE, LINE or CODE
  rows: list[dict[str, Any]]  # only the keys of the kind


def read(path: str) -> Questions:
  """Reads a file of questions; UserError names the file, or the line, that is not valid."""
  try:
    with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as file:
      lines = file.read().split(b'\n')
  except (OSError, EOFError, zlib.error, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'--tasks={path} cannot be read: {reason}.') from error
  kind, rows = '', []
  for number, line in enumerate(lines, 1):
    if line.strip():
      try:
        row = json_file.loads(line.decode())
      except ValueError as error:
        raise UserError(f'{path}:{number} is not JSON ({error}).') from None
      row = row if isinstance(row, dict) else {}
      kind = kind or (CODE if 'test' in row else CHOICE if 'choices' in row else LINE)
      rows.append(_checked(row, kind, f'{path}:{number}'))
  require(rows, f'--tasks={path} has no questions.')
  return Questions(Path(path).name.removesuffix('.gz').removesuffix('.jsonl'), kind, rows)


def _checked(row: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
  """The keys of the kind; UserError where one is missing or of the wrong type."""
  texts_of = lambda x: isinstance(x, list) and all(isinstance(s, str) and s.strip() for s in x)
  row = {key: row.get(key) for key in KEYS[kind]}
  for key in row.keys() - {'choices', 'answer'}:
    require(isinstance(row[key], str), f'{where}: the key "{key}" must be a string.')
  if kind == CHOICE:
    choices, answer = row['choices'], row['answer']
    enough = texts_of(choices) and len(choices) > 1
    require(enough, f'{where}: the key "choices" must be a list of at least two strings.')
    inside = type(answer) is int and 0 <= answer < len(choices)
    require(inside, f'{where}: the key "answer" must be the index of a choice, from 0.')
  if kind == LINE:
    row['answer'] = row['answer'] if isinstance(row['answer'], list) else [row['answer']]
    given = row['answer'] and texts_of(row['answer'])
    require(given, f'{where}: the key "answer" must be a non-empty string or a list of them.')
  return row


def lm_eval_task(questions: Questions) -> dict[str, Any]:
  """The configuration of a task of lm-eval; needs the extra `tasks`."""
  import datasets

  def generated(score: Callable, metric: str, max_new_tokens: int, until: list[str]) -> dict:
    return {
      'output_type': 'generate_until',
      'process_results': score,
      'metric_list': [{'metric': metric, 'aggregation': 'mean', 'higher_is_better': True}],
      'generation_kwargs': {'until': until, 'max_gen_toks': max_new_tokens, 'do_sample': False},
    }

  # A string is the name of a question's key.
  if questions.kind == CHOICE:
    task = {'doc_to_text': 'context', 'doc_to_choice': 'choices', 'doc_to_target': 'answer'}
    task |= {'output_type': 'multiple_choice'}  # whose metrics are acc and acc_norm
  elif questions.kind == LINE:
    task = {'doc_to_text': 'context', 'doc_to_target': lambda doc: doc['answer'][0]}
    task |= generated(scoring.exact_match, 'exact_match', 64, ['\n'])
  else:
    task = {'doc_to_text': 'prompt', 'doc_to_target': 'test', 'unsafe_code': True}
    # What ends a function in HumanEval; arXiv 2107.03374, section 2.
    ends = ['\nclass', '\ndef', '\n#', '\nif', '\nprint']
    task |= generated(scoring.human_eval, 'pass_at_1', 512, ends)
  return task | {
    'task': questions.name,
    'custom_dataset': lambda **_: {'test': datasets.Dataset.from_list(questions.rows)},
    'test_split': 'test',
    'fewshot_split': 'test',  # explicit, so that a question is never its own example
    'metadata': {'version': 1.0},
  }
