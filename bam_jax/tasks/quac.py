"""QuAC, arXiv 1808.07036: questions in a dialogue about a passage; lm-eval has no task of it.

Every question of a dialogue is one to answer, after the passage, the questions before it and their
answers. Scores are word F1 as in section 5.1 of its paper, but for the questions on which people
disagree, which it leaves out and this does not.
"""

import collections
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets

UNANSWERED = 'CANNOTANSWER'


def process_docs(dialogues: datasets.Dataset) -> datasets.Dataset:
  """A row for each question: `prompt` and `references`."""
  return datasets.Dataset.from_list([row for one in dialogues for row in _questions(one)])


def _questions(dialogue: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
  head = f'{dialogue["wikipedia_page_title"]}: {dialogue["section_title"]}'
  said = f'{head}\n\n{dialogue["context"].removesuffix(UNANSWERED).strip()}\n'
  known = dialogue['orig_answers']['texts']
  for question, references, answer in zip(
    dialogue['questions'], dialogue['answers']['texts'], known
  ):
    said += f'\nQ: {question}\nA:'
    yield {'prompt': said, 'references': counted(references)}
    said += f' {answer}'


def counted(references: Sequence[str]) -> list[str]:
  """Those that the majority agrees with on whether there is an answer."""
  unanswered = [one for one in references if one == UNANSWERED]
  if 2 * len(unanswered) >= len(references):
    return [UNANSWERED]
  return [one for one in references if one != UNANSWERED]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
  """The F1 of an answer."""
  return {'f1': f1(results[0].strip(), doc['references'])}


def f1(answer: str, references: Sequence[str]) -> float:
  """The best F1 with a reference, the mean over leaving each of several out: as people had it."""
  scores = [_f1(answer, one) for one in references]
  if len(scores) == 1:
    return scores[0]
  return sum(max(scores[:i] + scores[i + 1 :]) for i in range(len(scores))) / len(scores)


def _f1(answer: str, reference: str) -> float:
  if UNANSWERED in (answer, reference):
    return float(answer == reference)
  said, wanted = _words(answer), _words(reference)
  common = sum((collections.Counter(said) & collections.Counter(wanted)).values())
  return 2 * common / (len(said) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
  """Lower case, without punctuation and articles, as SQuAD's."""
  text = ''.join(c for c in text.lower() if c not in string.punctuation)
  return re.sub(r'\b(a|an|the)\b', ' ', text).split()
