"""Documents and their sources: what is read, and one clear sentence for what cannot be."""

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bam_jax.data import documents
from bam_jax.data.documents import read_documents
from bam_jax.data.sources import find_domains, find_files, find_split
from bam_jax.errors import UserError

TEXTS = ['first\r\nline', 'ünïcode 🐋', '', 'a\u2028b\x85c']
LINES = ''.join(json.dumps({'text': text, 'id': 1}) + '\n' for text in TEXTS)


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  data = content.encode() if isinstance(content, str) else content
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


def texts_of(path, **options):
  return [document.text for document in read_documents(path, **options)]


def test_json_lines(tmp_path):
  assert texts_of(write(tmp_path / 'a.jsonl', LINES)) == TEXTS
  assert texts_of(write(tmp_path / 'a.jsonl.gz', LINES)) == TEXTS
  assert texts_of(write(tmp_path / 'b.jsonl', '\n' + LINES + ' \n')) == TEXTS


def test_parquet(tmp_path):
  table = pa.table({'body': TEXTS * 200, 'n': range(800)})
  pq.write_table(table, tmp_path / 'a.parquet', row_group_size=300)
  assert texts_of(tmp_path / 'a.parquet', text_field='body') == TEXTS * 200


@pytest.mark.parametrize('name', ['a.txt', 'a.txt.gz', 'a.md'])
def test_a_text_file_is_one_document(tmp_path, name):
  text = 'one\r\ntwo\n\nthree é'
  assert texts_of(write(tmp_path / name, text)) == [text]


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.txt'])
def test_position_ends_at_the_size(tmp_path, name):
  path = write(tmp_path / name, LINES)
  *_, last = read_documents(path)
  assert last.position == path.stat().st_size


@pytest.mark.parametrize(
  'name, content, sentence',
  [
    ('a.jsonl', '', 'a.jsonl is empty'),
    ('a.jsonl', '\n \n', 'a.jsonl is empty'),
    ('a.txt', '', 'a.txt is empty'),
    ('a.jsonl', '{"text": "x"}\n{"text": \n', 'a.jsonl, line 2 is not JSON: .* column'),
    ('a.jsonl', '{"text": "x"}\n\n["x"]\n', 'a.jsonl, line 3 is not a JSON object'),
    ('a.jsonl', '{"txt": "x"}\n', "a.jsonl, line 1 has no field 'text'.*--text_field"),
    ('a.jsonl', '{"text": null}\n', "a.jsonl, line 1: 'text' holds NoneType, not a string"),
    ('a.jsonl', '{"text": 3}\n', "a.jsonl, line 1: 'text' holds int, not a string"),
    ('a.jsonl', '{"text": "\\ud800"}\n', 'a.jsonl, line 1: .*surrogate'),
    ('a.jsonl', '[' * 200_000, 'a.jsonl, line 1 is not JSON'),
    ('a.jsonl', b'{"text": "x"}\n{"text": "\xff"}\n', 'a.jsonl, line 2 is not UTF-8'),
    ('a.jsonl.gz', b'{"text": "x"}\n{"text": "\xff"}\n', 'a.jsonl.gz, line 2 is not UTF-8'),
    ('a.txt', b'x\ny\n\xe9', 'a.txt, line 3 is not UTF-8'),
    ('a.parquet', 'nonsense', 'a.parquet is not a Parquet file'),
    ('a.json', '{}', 'a.json is of an unknown kind: only .jsonl'),
  ],
)
def test_errors_name_file_and_line(tmp_path, name, content, sentence):
  path = write(tmp_path / name, content)
  with pytest.raises(UserError, match=sentence):
    list(read_documents(path))


def test_damaged_gzip(tmp_path):
  whole = gzip.compress((LINES * 500).encode())
  for damaged in (whole[:-20], b'not gzip', whole[:40] + b'\xff' * 40 + whole[80:]):
    path = tmp_path / 'a.jsonl.gz'
    path.write_bytes(damaged)
    with pytest.raises(UserError, match='a.jsonl.gz is damaged|line .* is not'):
      list(read_documents(path))


def test_parquet_errors(tmp_path):
  path = tmp_path / 'a.parquet'
  pq.write_table(pa.table({'body': ['a', None]}), path)
  with pytest.raises(UserError, match="a.parquet has no column 'text': choose .* from body"):
    list(read_documents(path))
  with pytest.raises(UserError, match='a.parquet, row 2: .* holds NoneType'):
    list(read_documents(path, text_field='body'))
  pq.write_table(pa.table({'text': pa.array([], pa.string())}), path)
  with pytest.raises(UserError, match='a.parquet is empty'):
    list(read_documents(path))


def test_a_small_parquet_file_does_not_fill_the_memory(tmp_path):
  """One text of 8 MiB for all of 256 rows, as a dictionary of one entry."""
  path, text = tmp_path / 'a.parquet', 'x' * 2**23
  table = pa.table({'text': pa.DictionaryArray.from_arrays(np.zeros(256, np.int32), [text])})
  pq.write_table(table, path, compression='zstd')
  assert path.stat().st_size < 2**13
  tracemalloc.start()
  before = pa.total_allocated_bytes()
  count = 0
  for document in read_documents(path):
    count += document.text == text
    assert pa.total_allocated_bytes() - before < 2**29
  assert count == 256
  assert tracemalloc.get_traced_memory()[1] < 2**29
  tracemalloc.stop()


def test_a_page_of_parquet_does_not_fill_the_memory(tmp_path, monkeypatch):
  path, table = tmp_path / 'a.parquet', pa.table({'text': ['x' * 2**20] * 4})
  pq.write_table(table, path, compression='zstd', use_dictionary=False)
  assert len(texts_of(path)) == 4
  monkeypatch.setattr(documents, 'GROUP_BYTES', 2**21)
  with pytest.raises(UserError, match='a.parquet unpacks to 4 MiB .* fewer rows in a group'):
    list(read_documents(path))
  pq.write_table(table, path, compression='none', use_dictionary=False)
  assert len(texts_of(path)) == 4


@pytest.mark.parametrize('number', [1, 5000])
def test_large_texts_of_parquet_are_read_a_few_at_a_time(tmp_path, number):
  path = tmp_path / 'a.parquet'
  texts = [f'{i} {"x" * 1000}' for i in range(number)] + [chr(97 + i) * 2**22 for i in range(3)]
  pq.write_table(pa.table({'text': texts}), path)
  assert [document.text for document in read_documents(path)] == texts


def test_a_small_file_of_json_does_not_fill_the_memory(tmp_path):
  path = tmp_path / 'a.jsonl.gz'
  with gzip.open(path, 'wb') as file:
    file.write(b'{"text": "x"}\n{"text": "x", "a": [' + b'{},' * 2**22 + b'{}]}\n')
  assert path.stat().st_size < 2**16
  with pytest.raises(UserError, match='line 2 is not a text with a few facts'):
    list(read_documents(path))


def test_a_large_text_of_json_may_hold_anything(tmp_path):
  text = r'{"a": [1, "\", {}]},' * 2**18
  path = tmp_path / 'a.jsonl'
  path.write_text(json.dumps({'text': text, 'a': list(range(100))}))
  assert [document.text for document in read_documents(path)] == [text]


def test_missing_file(tmp_path):
  with pytest.raises(UserError, match='gone.txt is not a file'):
    list(read_documents(tmp_path / 'gone.txt'))


def test_find_files_is_sorted_and_names_what_it_leaves(tmp_path):
  for name in ('b/z.txt', 'b/a.jsonl', 'a.md', 'b.parquet', '.hidden/x.txt', '.x.txt', 'b/x.py'):
    write(tmp_path / name, 'x')
  files, left_out = find_files(tmp_path)
  names = [file.relative_to(tmp_path).as_posix() for file in files]
  assert names == ['a.md', 'b/a.jsonl', 'b/z.txt', 'b.parquet']
  assert left_out == [tmp_path / 'b/x.py']
  with pytest.raises(UserError, match='holds no file that can be read'):
    find_files(write(tmp_path / 'c' / 'x.py', '').parent)
  with pytest.raises(UserError, match='does not exist'):
    find_files(tmp_path / 'gone')
  with pytest.raises(UserError, match='unknown kind'):
    find_files(tmp_path / 'b' / 'x.py')


@pytest.mark.parametrize('link', ['.', 'inner/..', 'inner'])
def test_no_document_is_read_twice_by_a_link(tmp_path, link):
  (tmp_path / 'inner').mkdir()
  (tmp_path / 'inner' / 'a.txt').write_text('text')
  (tmp_path / 'latest').symlink_to(link)
  with pytest.raises(UserError, match='is read twice, once of them by a link: remove the link'):
    find_files(tmp_path)


def test_what_is_not_a_file_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / 'pipe.txt')
  (tmp_path / 'inner').mkdir()
  (tmp_path / 'inner' / 'zero.jsonl').symlink_to('/dev/zero')
  for folder in (tmp_path, tmp_path / 'inner'):
    with pytest.raises(UserError, match='(pipe.txt|zero.jsonl) is not a file: remove it'):
      find_files(folder)
  with pytest.raises(UserError, match='pipe.txt is neither a file nor a folder'):
    find_files(tmp_path / 'pipe.txt')


@pytest.mark.parametrize(
  'path, split',
  [
    ('train.jsonl', 'train'),
    ('Train-00001.parquet', 'train'),
    ('validation/a.txt', 'valid'),
    ('valid_2.txt', 'valid'),
    ('heldout.jsonl.gz', 'valid'),
    ('test.jsonl', 'test'),
    ('testimony.txt', None),
    ('validity.md', None),
    ('trains/of/thought.md', None),
    ('a/contest.txt', None),
  ],
)
def test_find_split(path, split):
  assert find_split(Path(path)) == split


def test_find_domains(tmp_path):
  law, code = (
    write(tmp_path / 'in/law/a.txt', 'x').parent,
    write(tmp_path / 'in/code.jsonl.gz', 'x'),
  )
  write(tmp_path / 'in/NOTICE', 'about')
  write(tmp_path / 'in/README.md', 'about')
  assert find_domains([str(tmp_path / 'in')]) == {'code': code, 'law': law}
  assert find_domains([f'b={code}', f'a={law}']) == {'a': law, 'b': code}


@pytest.mark.parametrize(
  'inputs, sentence',
  [
    ([], 'Nothing to prepare'),
    (['{root}/law/a.txt'], 'names no domain: write --input=DOMAIN='),
    (['{root}/law', '{root}/law'], 'names no domain'),
    (['a b={root}/law'], 'a domain is named with'),
    (['../a={root}/law'], 'a domain is named with'),
    (['a={root}/law', 'a={root}/law'], 'the domain a is given twice'),
    (['a={root}/gone'], 'gone does not exist'),
    (['{root}/split'], 'is a split, not a domain'),
    (['{root}/odd'], 'is neither a folder nor one of'),
    (['{root}/twice'], 'name the same domain'),
    (['{root}/void'], 'holds no domain'),
    (['{root}/named'], 'cannot name a domain'),
  ],
)
def test_find_domains_errors(tmp_path, inputs, sentence):
  for name in ('law/a.txt', 'split/train.txt', 'odd/a.json', 'twice/a/x.txt', 'twice/a.txt'):
    write(tmp_path / name, 'x')
  write(tmp_path / 'void/NOTICE', 'x')
  write(tmp_path / 'named/a b.txt', 'x')
  with pytest.raises(UserError, match=sentence):
    find_domains([given.format(root=tmp_path) for given in inputs])
