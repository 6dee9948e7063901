"""Text for the jobs."""

import json
import random
from pathlib import Path

import pytest

WORDS = {
  'general': 'the whale and the captain went down to the grey sea and sang of home'.split(),
  'code': 'def return self for in range ( x ) : + = print [ i ] import None'.split(),
}


@pytest.fixture(scope='session')
def text(tmp_path_factory) -> Path:
  """Two domains of nonsense."""
  folder = tmp_path_factory.mktemp('text')
  chance = random.Random(0)
  for domain, words in WORDS.items():
    for split, count in (('train', 60), ('valid', 8)):
      path = folder / domain / f'{split}.jsonl'
      path.parent.mkdir(exist_ok=True)
      lines = [' '.join(chance.choices(words, k=chance.randint(5, 60))) for _ in range(count)]
      path.write_text(''.join(json.dumps({'text': line}) + '\n' for line in lines))
  return folder
