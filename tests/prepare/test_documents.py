"""Documents and their sources: what is read, and one clear sentence for what cannot be."""

import codecs
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bam_jax.errors import UserError
from bam_jax.prepare import documents
from bam_jax.prepare.documents import read_documents
from bam_jax.prepare.sources import find_domains, find_files, find_split

TEXTS = ['first\r\nline', 'ünïcode 🐋', '', 'a\u2028b\x85c']
LINES = ''.join(json.dumps({'text': text, 'id': 1}) + '\n' for text in TEXTS)


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  data = content.encode() if isinstance(content, str) else content
  if path.suffix == '.zst':  # two frames, as `cat` of two files makes them
    data = b''.join(pa.compress(x, 'zstd', asbytes=True) for x in (data[:9], data[9:]))
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


def texts_of(path, **options):
  return [document.text for document in read_documents(path, **options)]


def test_json_lines(tmp_path):
  assert texts_of(write(tmp_path / 'a.jsonl', LINES)) == TEXTS
  assert texts_of(write(tmp_path / 'a.jsonl.gz', LINES)) == TEXTS
  path = write(tmp_path / 'a.jsonl.zst', LINES)
  assert texts_of(path) == TEXTS
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(UserError, match='a.jsonl.zst cannot be read: Truncated compressed stream'):
    list(read_documents(path))
  assert texts_of(write(tmp_path / 'b.jsonl', '\n' + LINES + ' \n')) == TEXTS


def test_parquet(tmp_path):
  table = pa.table({'body': TEXTS * 200, 'n': range(800)})
  pq.write_table(table, tmp_path / 'a.parquet', row_group_size=300)
  assert texts_of(tmp_path / 'a.parquet', text_field='body') == TEXTS * 200


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst', 'a.txt'])
def test_position_ends_at_the_size_and_a_leading_mark_is_skipped(tmp_path, name):
  path = write(tmp_path / name, codecs.BOM_UTF8 + LINES.encode())
  *_, last = read_documents(path)
  assert last.position == path.stat().st_size
  assert texts_of(path) == ([LINES] if name == 'a.txt' else TEXTS)


@pytest.mark.parametrize(
  'name, where', [('a.txt', ''), ('a.jsonl', ', line 2'), ('a.parquet', ', row 2')]
)
def test_a_huge_document_is_refused_by_its_place(tmp_path, name, where, monkeypatch):
  monkeypatch.setattr(documents, 'DOCUMENT_BYTES', 2**16)
  path = tmp_path / name

  def save(text):
    if name == 'a.parquet':
      pq.write_table(pa.table({'text': ['x', text]}), path)
    else:
      write(path, text if name == 'a.txt' else f'{{"text": "x"}}\n{{"text": "{text}"}}\n')

  save('x' * (2**16 - 20))
  assert len(texts_of(path)[-1]) == 2**16 - 20
  save('é' * 2**15 + 'x')
  with pytest.raises(UserError, match=f'{name}{where} is larger than 0 MiB: split it'):
    list(read_documents(path))


@pytest.mark.parametrize(
  'name, content, sentence',
  [
    ('a.jsonl', '{"text": "x"}\n{"text": \n', 'a.jsonl, line 2 is not JSON: .* column'),
    ('a.jsonl', '{"text": "x"}\n\n["x"]\n', 'a.jsonl, line 3 is not a JSON object'),
    ('a.jsonl', '{"txt": "x"}\n', "a.jsonl, line 1 has no field 'text'.*--text_field"),
    ('a.jsonl', '{"text": null}\n', "a.jsonl, line 1: 'text' holds NoneType, not a string"),
    ('a.jsonl', '{"text": "\\ud800"}\n', 'a.jsonl, line 1: .*surrogate'),
    ('a.jsonl', '[' * 200_000, 'a.jsonl, line 1 is not JSON'),
    ('a.jsonl', b'{"text": "x"}\n{"text": "\xff"}\n', 'a.jsonl, line 2 is not UTF-8'),
    ('a.txt', b'x\ny\n\xe9', 'a.txt, line 3 is not UTF-8'),
    ('a.parquet', 'nonsense', 'a.parquet is not a Parquet file'),
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


def test_find_files_is_sorted_and_names_what_it_leaves(tmp_path):
  for name in ('b/z.txt', 'b/a.jsonl', 'a.md', 'b.parquet', '.hidden/x.txt', '.x.txt', 'b/x.py'):
    write(tmp_path / name, 'x')
  write(tmp_path / 'LICENSE', 'x')
  with pytest.raises(UserError, match='b/x.py is none of .*: convert it, remove it'):
    find_files(tmp_path)
  files, left_out = find_files(tmp_path, skip_unknown=True)
  names = [file.relative_to(tmp_path).as_posix() for file in files]
  assert names == ['a.md', 'b/a.jsonl', 'b/z.txt', 'b.parquet']
  assert left_out == [tmp_path / 'LICENSE', tmp_path / 'b/x.py']
  with pytest.raises(UserError, match='holds no file that can be read'):
    find_files(write(tmp_path / 'c' / 'x.py', '').parent)
  with pytest.raises(UserError, match='does not exist'):
    find_files(tmp_path / 'gone')
  with pytest.raises(UserError, match='x.py has an unknown file type: only .jsonl'):
    find_files(tmp_path / 'b' / 'x.py')
  for path in (write(tmp_path / 'd' / 'a.jsonl', ''), tmp_path / 'd'):
    with pytest.raises(UserError, match='a.jsonl is empty'):
      find_files(path)


@pytest.mark.parametrize('name', ['licenses.csv', 'notices.jsonl.bz2', 'readme_first.tsv'])
def test_data_is_not_taken_for_a_note(tmp_path, name):
  write(tmp_path / 'a.txt', 'x')
  write(tmp_path / 'README.md', 'about')
  assert find_files(tmp_path)[1] == [] and find_domains([str(tmp_path)]) == {
    'a': tmp_path / 'a.txt'
  }
  write(tmp_path / name, 'x')
  with pytest.raises(UserError, match=f'{name} is none of .jsonl'):
    find_files(tmp_path)
  write(tmp_path / 'notices.jsonl', '{"text": "x"}')
  assert 'notices' in find_domains([str(tmp_path)])


@pytest.mark.parametrize('link', ['.', 'inner'])
def test_no_document_is_read_twice_by_a_link(tmp_path, link):
  write(tmp_path / 'inner' / 'a.txt', 'text')
  (tmp_path / 'latest').symlink_to(link)
  with pytest.raises(UserError, match='is read twice because of a link: remove the link'):
    find_files(tmp_path)


@pytest.mark.parametrize('path, split', [
  ('train.jsonl', 'train'), ('Train-00001.parquet', 'train'), ('validation/a.txt', 'valid'),
  ('valid_2.txt', 'valid'), ('heldout.jsonl.gz', 'valid'), ('test.jsonl', 'test'),
  ('testimony.txt', None), ('trains/of/thought.md', None), ('a/contest.txt', None),
])  # fmt: skip
def test_find_split(path, split):
  assert find_split(Path(path)) == split


def test_find_domains(tmp_path):
  law = write(tmp_path / 'in/law/a.txt', 'x').parent
  code = write(tmp_path / 'in/code.jsonl.gz', 'x')
  write(tmp_path / 'in/NOTICE', 'about')
  write(tmp_path / 'in/README.md', 'about')
  assert find_domains([str(tmp_path / 'in')]) == {'code': code, 'law': law}
  assert find_domains([f'b={code}', f'a={law}']) == {'a': law, 'b': code}


@pytest.mark.parametrize(
  'inputs, sentence',
  [
    ([], '--input is required'),
    (['{root}/law/a.txt'], 'names no domain: write --input=DOMAIN='),
    (['../a={root}/law'], 'cannot name a domain'),
    (['manifest.json={root}/law'], 'cannot name a domain'),
    (['a={root}/law', 'a={root}/law'], 'the domain a is given twice'),
    (['{root}/split'], 'is a split, not a domain'),
    (['{root}/twice'], 'the domain a is given twice'),
    (['{root}/void'], 'holds no domain'),
  ],
)
def test_find_domains_errors(tmp_path, inputs, sentence):
  for name in ('law/a.txt', 'split/train.txt', 'odd/a.json', 'twice/a/x.txt', 'twice/a.txt'):
    write(tmp_path / name, 'x')
  write(tmp_path / 'void/NOTICE', 'x')
  with pytest.raises(UserError, match=sentence):
    find_domains([given.format(root=tmp_path) for given in inputs])
