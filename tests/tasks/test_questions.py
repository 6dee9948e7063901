"""Files of questions: read whole, or refused in a sentence that says where."""

import gzip
import json

import pytest

from bam_jax.errors import UserError
from bam_jax.tasks import questions

CHOICE = {'id': 'x/0', 'context': 'The sky is', 'choices': ['blue', 'green'], 'answer': 0}
LINE = {'context': 'Q: 1 + 1?\nA:', 'answer': '2'}
CODE = {'prompt': 'def f():\n', 'test': 'def check(f): assert f()', 'entry_point': 'f'}


def write(path, rows):
  text = '\n'.join(row if isinstance(row, str) else json.dumps(row) for row in rows)
  opened = gzip.open if path.suffix == '.gz' else open
  with opened(path, 'wt', encoding='utf-8') as file:
    file.write(text)
  return str(path)


def test_kinds(tmp_path):
  for name, row, kind in (('a.jsonl', CHOICE, 'choice'), ('b.v1.jsonl.gz', CODE, 'code')):
    found = questions.read(write(tmp_path / name, [row, '', row]))
    assert (found.name, found.kind) == (name.partition('.jsonl')[0], kind)
    assert found.rows == [{k: v for k, v in row.items() if k != 'id'}] * 2
  found = questions.read(write(tmp_path / 'c.jsonl', [LINE, {**LINE, 'answer': ['2', 'two']}]))
  assert found.kind == 'line'
  assert [row['answer'] for row in found.rows] == [['2'], ['2', 'two']]


@pytest.mark.parametrize('first, second, word', [
  (CHOICE, '{', 'not JSON'), (CHOICE, '[' * 100_000, 'not JSON'), (CHOICE, '1', 'context'),
  (CHOICE, '{}', 'context'), (CHOICE, LINE, 'choices'),
  (CHOICE, CHOICE | {'context': 1}, 'context'), (CHOICE, CHOICE | {'choices': ['x']}, 'choices'),
  (CHOICE, CHOICE | {'answer': 2}, 'answer'), (CHOICE, CHOICE | {'answer': -1}, 'answer'),
  (LINE, LINE | {'answer': []}, 'answer'), (LINE, LINE | {'answer': 2}, 'answer'),
  (LINE, LINE | {'answer': ' '}, 'answer'), (CODE, CODE | {'prompt': None}, 'prompt'),
  (CODE, CODE | {'test': 1}, 'test'), (CODE, CODE | {'entry_point': 1}, 'entry_point'),
])  # fmt: skip
def test_bad_rows(tmp_path, first, second, word):
  path = write(tmp_path / 'a.jsonl', [first, second])
  with pytest.raises(UserError, match=f'{path}:2:? .*{word}'):
    questions.read(path)


def test_bad_files(tmp_path):
  (tmp_path / 'cut.jsonl.gz').write_bytes(gzip.compress(b'{}' * 1000)[:-9])
  (tmp_path / 'odd.jsonl.gz').write_bytes(b'{}')
  (tmp_path / 'empty.jsonl').write_bytes(b'\n\n')
  (tmp_path / 'folder.jsonl').mkdir()
  for name in ('cut.jsonl.gz', 'odd.jsonl.gz', 'empty.jsonl', 'folder.jsonl', 'nowhere.jsonl'):
    with pytest.raises(UserError, match=f'--tasks={tmp_path}/{name}'):
      questions.read(str(tmp_path / name))
  (tmp_path / 'latin.jsonl').write_bytes(b'{"context": "\xe9"}')
  with pytest.raises(UserError, match='latin.jsonl:1 '):
    questions.read(str(tmp_path / 'latin.jsonl'))
