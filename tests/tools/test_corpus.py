"""The corpus from packages made up here: archives, what is dropped or held out."""

import gzip
import hashlib
import io
import itertools
import json
import lzma
import tarfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bam_jax.data import sources as data_sources
from bam_jax.errors import UserError
from tools.corpus import archives, build, splits, text
from tools.corpus.sources import SOURCES

pytestmark = pytest.mark.slow
FILES = {'b/two.py': b'2\n', 'a/one.py': b'1\n'}


def tar(files, prefix=''):
  content = io.BytesIO()
  with tarfile.open(fileobj=content, mode='w') as archive:
    link = tarfile.TarInfo('a/link.py')
    link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
    archive.addfile(link)
    for name, data in files.items():
      member = tarfile.TarInfo(prefix + name)
      member.size = len(data)
      archive.addfile(member, io.BytesIO(data))
  return content.getvalue()


def wheel(path, files=FILES):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.mkdir('a')
    for name, data in files.items():
      archive.writestr(name, data)
  return path


def tarball(path, files=FILES):
  path.write_bytes(gzip.compress(tar(files)))
  return path


def debian(path, files=FILES):
  parts = {'debian-binary': b'2.0', 'data.tar.xz': lzma.compress(tar(files, './'))}
  content = b'!<arch>\n'
  for name, data in parts.items():  # an odd size is padded
    content += f'{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(data):<10}`\n'.encode() + data
    content += b'\n' * (len(data) % 2)
  path.write_bytes(content)
  return path


MAKERS = {'a.whl': wheel, 'a.tgz': tarball, 'a.deb': debian}


@pytest.mark.parametrize('name', MAKERS)
def test_members_are_the_plain_files_in_order(name, tmp_path):
  archive = MAKERS[name](tmp_path / name)
  assert list(archives.members(archive)) == [('a/one.py', b'1\n'), ('b/two.py', b'2\n')]


@pytest.mark.parametrize('inside', ['a/../../b.py', '/etc/passwd'])
def test_a_member_that_escapes_is_refused(inside, tmp_path):
  with pytest.raises(UserError, match='outside of itself'):
    list(archives.members(tarball(tmp_path / 'a.tgz', {inside: b'x'})))


def test_a_cached_archive_needs_no_client_and_is_verified_each_time(tmp_path, monkeypatch):
  sha256 = hashlib.sha256(wheel(tmp_path / 'a.whl').read_bytes()).hexdigest()
  about = archives.Package('pypi', 'made-up', '1.0', 'a.whl', sha256, 'MIT')
  monkeypatch.setenv('PATH', '')
  assert archives.fetch(about, tmp_path) == tmp_path / 'a.whl'
  with open(tmp_path / 'a.whl', 'ab') as file:
    file.write(b'\0')
  with pytest.raises(UserError, match=r'a\.whl is not the archive .* SHA-256 .* delete it'):
    archives.fetch(about, tmp_path)


@given(st.text(alphabet='ab. \n', max_size=400), st.integers(8, 60))
def test_pieces_lose_no_word_and_are_about_the_size(content, size):
  cut = text.pieces(content, size)
  assert ''.join('\n\n'.join(cut).split()) == ''.join(content.split())
  assert all(len(piece) + 2 >= size for piece in cut[:-1])


def words(start, count):
  return ' '.join(f'w{i}' for i in range(start, start + count)) + '\n'


def record(name, content):
  return splits.Record(name, 'made-up', content)


def names_of(split, count):
  """Names that the hash puts into a split, found by the definition."""
  names = []
  for i in itertools.count():
    share = int(hashlib.sha256(f'made-up:{i}'.encode()).hexdigest()[:8], 16) / 16**8
    if split == ('test' if share < 0.05 else 'valid' if share < 0.1 else 'train'):
      names.append(f'made-up:{i}')
    if len(names) == count:
      return names


def test_held_out_text_that_train_repeats_is_dropped():
  """Of 100 words, 88 runs of 13: with 30 from train 18 of them, a fifth and more."""
  [train], valid, [test] = names_of('train', 1), names_of('valid', 2), names_of('test', 1)
  records = [
    record(train, words(0, 400)),
    record(valid[0], words(0, 29) + words(1000, 71)),  # 17 of 88
    record(valid[1], words(100, 30) + words(2000, 70)),  # 18 of 88
    # 14 from what is held out for valid, and 4 from train
    record(test, words(1000, 26) + words(200, 16) + words(3000, 58)),
  ]
  found = {name: [r.id for r in some] for name, some in splits.split(records).items()}
  assert found == {'train': [train], 'valid': [valid[0]], 'test': []}


@settings(max_examples=20)
@given(st.permutations(range(60)))
def test_works_stay_together_whatever_comes_first(order):
  records = [record(f'made-up:{i // 3}#{i % 3}', words(1000 + 100 * i, 60)) for i in order]
  parts = splits.split(records)
  homes = {}
  for name, some in parts.items():
    for r in some:
      assert homes.setdefault(r.work, name) == name
  assert sum(map(len, parts.values())) == 60
  assert parts == splits.split(sorted(records))


def test_the_corpus_is_the_same_each_time_and_read_by_prepare(tmp_path):
  files = {f'd/m{i}.py': words(1000 + 100 * i, 80).encode() for i in range(40)}
  archive = wheel(tmp_path / 'x.whl', files)
  written = []
  for folder in ('one', 'two'):
    for domain in ('code', 'law'):
      source = SOURCES['code'][0]
      facts = build.domain([source], [archive], tmp_path / folder / domain)
      assert sum(split['documents'] for split in facts['splits'].values()) == 40
    (tmp_path / folder / build.NOTICE).write_text('{}')
    written.append({p.name: p.read_bytes() for p in (tmp_path / folder / 'law').iterdir()})
  assert written[0] == written[1] and len(written[0]) == 3
  content = gzip.decompress(written[0]['train.jsonl.gz'])
  assert hashlib.sha256(content).hexdigest() == facts['splits']['train']['sha256']
  first = json.loads(content.decode().splitlines()[0])
  assert set(first) == {'id', 'source', 'text'} and first['source'] == 'django'
  assert first['id'].startswith('django:d/m') and first['text'].encode() in files.values()

  domains = data_sources.find_domains([str(tmp_path / 'one')])
  assert list(domains) == ['code', 'law']  # and no complaint about the notice
  found = data_sources.Domain.find('law', domains['law'], 'text')
  assert [split for _, split in found.files] == ['valid', 'train']
  assert found.left_out == ('law/test.jsonl.gz',)
