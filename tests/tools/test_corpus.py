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

from bam_jax.errors import UserError
from bam_jax.prepare import sources as data_sources
from tools.corpus import archives, build, splits
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
  found = data_sources.Domain.find('law', domains['law'], 'text', 0.0)
  assert [split for _, split in found.files] == ['valid', 'train']
  assert found.left_out == ('law/test.jsonl.gz',)
