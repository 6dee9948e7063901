"""lm-eval's tasks of questions in a file."""

from collections.abc import Sequence
from typing import Any

import datasets

from bam_jax.tasks import code, sets

# What ends a function in HumanEval; arXiv 2107.03374, section 2.
FUNCTION_ENDS = ['\nclass', '\ndef', '\n#', '\nif', '\nprint']
FUNCTION_TOKENS = 512  # new ones, at most
LINE_TOKENS = 64


def task(questions: sets.Questions) -> dict[str, Any]:
  """The configuration of a task of lm-eval."""
  return {
    'task': questions.name,
    'custom_dataset': lambda **_: {'test': datasets.Dataset.from_list(questions.rows)},
    'test_split': 'test',
    'fewshot_split': 'test',  # said, so that a question is no example of itself
    'metadata': {'version': 1.0},
    **_KINDS[questions.kind],
  }


def _exact(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
  """Whether the line is one of the answers, upper and lower case and outer spaces alike."""
  said = results[0].strip().casefold()
  return {'exact_match': float(said in [one.strip().casefold() for one in doc['answer']])}


def _metrics(*names: str) -> list[dict[str, Any]]:
  return [{'metric': n, 'aggregation': 'mean', 'higher_is_better': True} for n in names]


_KINDS: dict[str, dict[str, Any]] = {
  sets.CHOICE: {
    'output_type': 'multiple_choice',
    'doc_to_text': lambda doc: doc['context'],
    'doc_to_choice': lambda doc: doc['choices'],
    'doc_to_target': lambda doc: doc['answer'],
    'target_delimiter': ' ',
    'metric_list': _metrics('acc', 'acc_norm'),
  },
  sets.LINE: {
    'output_type': 'generate_until',
    'doc_to_text': lambda doc: doc['context'],
    'doc_to_target': lambda doc: doc['answer'][0],
    'process_results': _exact,
    'metric_list': _metrics('exact_match'),
    'generation_kwargs': {'until': ['\n'], 'max_gen_toks': LINE_TOKENS, 'do_sample': False},
  },
  sets.CODE: {
    'output_type': 'generate_until',
    'unsafe_code': True,
    'doc_to_text': lambda doc: doc['prompt'],
    'doc_to_target': lambda doc: doc['test'],
    'process_results': code.human_eval,
    'metric_list': _metrics('pass_at_1'),
    'generation_kwargs': {
      'until': FUNCTION_ENDS, 'max_gen_toks': FUNCTION_TOKENS, 'do_sample': False
    },
  },
}  # fmt: skip
