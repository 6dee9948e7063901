"""Which documents of a domain are kept, and which are held out."""

import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

SPLITS = ('train', 'valid', 'test')
HELD_OUT = 0.05  # of the works, each for valid and for test
SHORTEST = 300  # characters
REPEATED_WORDS, MOST_REPEATED = 5, 0.5  # among all documents
LEAKED_WORDS, MOST_LEAKED = 13, 0.2  # of a held-out document, in what it is held out from

Shingles = set[tuple[str, ...]]


class Record(NamedTuple):
  """A document: `source:path#piece`, the package, the text."""

  id: str
  source: str
  text: str

  @property
  def work(self) -> str:
    """The work or file that the document is a piece of."""
    return self.id.split('#')[0]


def split(records: Iterable[Record]) -> dict[str, list[Record]]:
  """Drops short and repeated documents, and parts the others into train, valid and test.

  Texts of equal letters and digits count as one. Of those that are much alike, two versions of a
  licence say, the longest stays: longest first, a document stays when fewer than half of its runs
  of 5 words are in those that stayed. Works are held out whole, by a hash of their name. A held-out
  document goes when a fifth of its runs of 13 words are in train, or in one held out before it.
  Each split is in a fixed random order, so that any prefix of it is a fair sample.
  """
  records = _distinct(record for record in records if len(record.text) >= SHORTEST)
  longest_first = sorted(records, key=lambda record: (-len(record.text), record.id))
  kept = set(_novel(longest_first, set(), REPEATED_WORDS, MOST_REPEATED))
  splits = {name: [] for name in SPLITS}
  for record in records:
    if record in kept:
      splits[_choose(record.work)].append(record)
  seen = set().union(*(shingles(record.text, LEAKED_WORDS) for record in splits['train']))
  for name in ('valid', 'test'):
    splits[name] = _novel(splits[name], seen, LEAKED_WORDS, MOST_LEAKED)
  for some in splits.values():
    some.sort(key=lambda record: _digest(f'order:{record.id}'))
  return splits


def shingles(text: str, words: int) -> Shingles:
  """The runs of so many words in a text."""
  found = re.findall(r'\w+', text.lower())
  return set(zip(*(found[i:] for i in range(words))))


def _distinct(records: Iterable[Record]) -> list[Record]:
  first = {}
  for record in records:
    first.setdefault(_digest(re.sub(r'\W+', '', record.text.lower())), record)
  return list(first.values())


def _novel(records: Iterable[Record], seen: Shingles, words: int, limit: float) -> list[Record]:
  """Those of whose runs of words less than a share is in `seen`, which grows by what is kept."""
  kept = []
  for record in records:
    own = shingles(record.text, words)
    if len(own & seen) < limit * len(own):
      seen |= own
      kept.append(record)
  return kept


def _choose(work: str) -> str:
  share = int.from_bytes(_digest(work)[:4], 'big') / 2**32
  return 'test' if share < HELD_OUT else 'valid' if share < 2 * HELD_OUT else 'train'


def _digest(text: str) -> bytes:
  return hashlib.sha256(text.encode()).digest()
