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
from pathlib import Path
from typing import Any, NamedTuple

from bam_jax.errors import UserError
from bam_jax.files import json_file
from bam_jax.tasks import scoring

SUFFIXES = ('.jsonl', '.jsonl.gz')
MAX_BYTES = 2**28  # of a file's text
CHOICE, LINE, CODE = 'choice', 'line', 'code'  # kinds
# What ends a function in HumanEval; arXiv 2107.03374, section 2.
FUNCTION_ENDS = ['\nclass', '\ndef', '\n#', '\nif', '\nprint']


class Questions(NamedTuple):
  """The questions of one file."""

  name: str  # of the file, without its suffix
  kind: str  # CHOICE, LINE or CODE
  rows: list[dict[str, Any]]  # only the keys of the kind


def is_file(task: str) -> bool:
  """Whether `--tasks` names a file of questions rather than a task of lm-eval."""
  return task.endswith(SUFFIXES)


def read(path: str) -> Questions:
  """Reads a file of questions; UserError names the file, or the line, that is not valid."""
  try:
    with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as file:
      content = file.read(MAX_BYTES + 1)
  except (OSError, EOFError, zlib.error, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'--tasks={path} cannot be read: {reason}.') from error
  if len(content) > MAX_BYTES:
    raise UserError(f'--tasks={path} is larger than {MAX_BYTES >> 20} MiB: split the file.')
  kind, rows = '', []
  for number, line in enumerate(content.split(b'\n'), 1):
    if line.strip():
      try:
        row = json_file.loads(line.decode())
      except ValueError as error:
        raise UserError(f'{path}:{number} is not JSON ({error}).') from None
      row = row if isinstance(row, dict) else {}
      kind = kind or (CODE if 'test' in row else CHOICE if 'choices' in row else LINE)
      rows.append(_check(row, kind, f'{path}:{number}'))
  if not rows:
    raise UserError(f'--tasks={path} has no questions.')
  return Questions(Path(path).name.removesuffix('.gz').removesuffix('.jsonl'), kind, rows)


def _check(row: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
  """The keys of the kind; UserError where one is missing or of the wrong type."""
  is_text = lambda x: isinstance(x, str) and bool(x.strip())
  texts = ['prompt', 'test', 'entry_point'] if kind == CODE else ['context']
  for key in texts:
    if not isinstance(row.get(key), str):
      raise UserError(f'{where}: the key "{key}" must be a string.')
  answer, choices = row.get('answer'), row.get('choices')
  if kind == CHOICE:
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(is_text, choices)):
      raise UserError(f'{where}: the key "choices" must be a list of at least two strings.')
    if type(answer) is not int or not 0 <= answer < len(choices):
      raise UserError(f'{where}: the key "answer" must be the index of a choice, from 0.')
  if kind == LINE:
    row['answer'] = answer if isinstance(answer, list) else [answer]
    if not row['answer'] or not all(map(is_text, row['answer'])):
      raise UserError(f'{where}: the key "answer" must be a non-empty string or a list of them.')
  keys = texts + {CHOICE: ['choices', 'answer'], LINE: ['answer'], CODE: []}[kind]
  return {key: row[key] for key in keys}


def lm_eval_task(questions: Questions) -> dict[str, Any]:
  """The configuration of a task of lm-eval; needs the extra `tasks`."""
  import datasets

  task = {
    'task': questions.name,
    'custom_dataset': lambda **_: {'test': datasets.Dataset.from_list(questions.rows)},
    'test_split': 'test',
    'fewshot_split': 'test',  # explicit, so that a question is never its own example
    'metadata': {'version': 1.0},
  }
  metrics = lambda *names: [
    {'metric': name, 'aggregation': 'mean', 'higher_is_better': True} for name in names
  ]
  if questions.kind == CHOICE:
    return task | {
      'output_type': 'multiple_choice',
      'doc_to_text': lambda doc: doc['context'],
      'doc_to_choice': lambda doc: doc['choices'],
      'doc_to_target': lambda doc: doc['answer'],
      'target_delimiter': ' ',
      'metric_list': metrics('acc', 'acc_norm'),
    }
  if questions.kind == LINE:
    return task | {
      'output_type': 'generate_until',
      'doc_to_text': lambda doc: doc['context'],
      'doc_to_target': lambda doc: doc['answer'][0],
      'process_results': scoring.exact_match,
      'metric_list': metrics('exact_match'),
      'generation_kwargs': {'until': ['\n'], 'max_gen_toks': 64, 'do_sample': False},
    }
  return task | {
    'output_type': 'generate_until',
    'unsafe_code': True,
    'doc_to_text': lambda doc: doc['prompt'],
    'doc_to_target': lambda doc: doc['test'],
    'process_results': scoring.human_eval,
    'metric_list': metrics('pass_at_1'),
    'generation_kwargs': {'until': FUNCTION_ENDS, 'max_gen_toks': 512, 'do_sample': False},
  }
