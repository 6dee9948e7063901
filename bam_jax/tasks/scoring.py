"""How the tasks of bam_jax are scored; lm-eval calls these functions.

Programs that a model writes are run in `sandbox`, and only by tasks with `unsafe_code: true`, which
lm-eval refuses unless its caller confirms.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bam_jax.tasks import sandbox


def human_eval(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
  """pass@1 of a function that continues `prompt`; arXiv 2107.03374, section 2."""
  check = f'{doc["test"]}\ncheck({doc["entry_point"]})'
  return _pass_at_1(f'{doc["prompt"]}{results[0]}\n{check}\n')


def mbpp(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
  """pass@1 of a program that must satisfy `test_list`; arXiv 2108.07732, section 2.1."""
  return _pass_at_1('\n'.join([results[0], doc['test_setup_code'] or '', *doc['test_list']]))


def mbpp_examples(docs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """The few-shot examples of MBPP's authors: tasks 2, 3 and 4."""
  return [doc for doc in docs if doc['task_id'] in (2, 3, 4)]


def _pass_at_1(program: str) -> dict[str, float]:
  return {'pass_at_1': float(not sandbox.run(program))}
