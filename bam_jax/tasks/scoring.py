"""How the tasks of bam_jax are scored; lm-eval calls these functions.

Programs that a model writes are run in `sandbox`, and only by tasks with `unsafe_code: true`, which
lm-eval refuses unless its caller confirms.
"""

import collections
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bam_jax.tasks import sandbox

UNANSWERED = 'CANNOTANSWER'  # in QuAC


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


def quac_questions(dialogues):
  """A row with `prompt` and `references` for each question of QuAC's dialogues, arXiv 1808.07036.

  A prompt is the passage, and the dialogue so far with the answers that people gave.
  """
  rows = []
  for dialogue in dialogues:
    passage = dialogue['context'].removesuffix(UNANSWERED).strip()
    prompt = f'{dialogue["wikipedia_page_title"]}: {dialogue["section_title"]}\n\n{passage}\n'
    answers = zip(dialogue['answers']['texts'], dialogue['orig_answers']['texts'])
    for question, (references, answer) in zip(dialogue['questions'], answers):
      prompt += f'\nQ: {question}\nA:'
      # Those that agree with the majority on whether there is an answer.
      answered = [reference for reference in references if reference != UNANSWERED]
      majority = answered if 2 * len(answered) > len(references) else [UNANSWERED]
      rows.append({'prompt': prompt, 'references': majority})
      prompt += f' {answer}'
  return dialogues.from_list(rows)  # of datasets.Dataset


def quac_f1(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
  """Word F1 as in section 5.1 of QuAC's paper, questions on which people disagree included.

  Of several references: the mean over leaving each out of the best F1 with one of the others.
  """
  scores = [_f1(results[0].strip(), reference) for reference in doc['references']]
  if len(scores) == 1:
    return {'f1': scores[0]}
  best = [max(scores[:i] + scores[i + 1 :]) for i in range(len(scores))]
  return {'f1': sum(best) / len(best)}


def _f1(answer: str, reference: str) -> float:
  if UNANSWERED in (answer, reference):
    return float(answer == reference)
  said, wanted = _words(answer), _words(reference)
  common = sum((collections.Counter(said) & collections.Counter(wanted)).values())
  return 2 * common / (len(said) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
  """Lower case, without punctuation and articles, as in SQuAD."""
  text = ''.join(c for c in text.lower() if c not in string.punctuation)
  return re.sub(r'\b(a|an|the)\b', ' ', text).split()
