"""What HumanEval and MBPP run, and where: in `sandbox`, and only by tasks marked as unsafe.

lm-eval refuses a task with `unsafe_code: true` unless its caller confirms; nothing else in the
project calls these functions.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bam_jax.tasks import sandbox


def human_eval(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
  """pass@1 of a function that continues `prompt`; arXiv 2107.03374, section 2."""
  check = f'{doc["test"]}\ncheck({doc["entry_point"]})'
  return _score(f'{doc["prompt"]}{results[0]}\n{check}\n')


def mbpp(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
  """pass@1 of a program that has to satisfy `test_list`; arXiv 2108.07732, section 2.1."""
  return _score('\n'.join([results[0], doc['test_setup_code'] or '', *doc['test_list']]))


def mbpp_examples(docs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """Those that MBPP's authors solve in their prompt: tasks 2, 3 and 4."""
  return [doc for doc in docs if doc['task_id'] in (2, 3, 4)]


def _score(program: str) -> dict[str, float]:
  return {'pass_at_1': float(sandbox.run(program).passed)}
