"""Preparation end to end: deterministic, restartable, and nothing lost without a word."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers

from bam_jax.data.store import open_dataset
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.prepare import dataset as prepare_lib
from bam_jax.prepare import shuffle, training
from bam_jax.prepare.dataset import prepare


def write_lines(path, texts):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  return path


def contents(folder):
  files = sorted(path for path in folder.rglob('*') if path.is_file())
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def texts_of(folder, domain, split):
  dataset = open_dataset(folder)
  tokenizer = dataset.tokenizer()
  return [tokenizer.decode(ids) for ids in dataset.documents(domain, split)]


def command(*arguments):
  return [sys.executable, '-m', 'bam_jax.prepare', *map(str, arguments)]


def run(*arguments):
  return subprocess.run(command(*arguments), capture_output=True, text=True)


def write_domains(root, documents):
  for domain in 'ab':
    texts = [f'{domain}{i}: ' + f'the {i % 97} whale, {i} ' * 30 for i in range(documents)]
    write_lines(root / domain / 'part-1.jsonl', texts[: documents // 2])
    write_lines(root / domain / 'part-2.jsonl', texts[documents // 2 :])
  return root


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  """Two domains of two splits each."""
  return write_domains(tmp_path_factory.mktemp('sources'), 4_000)


@pytest.fixture(scope='module')
def undisturbed(sources, tmp_path_factory):
  output = tmp_path_factory.mktemp('undisturbed') / 'data'
  inputs = {domain: sources / domain for domain in 'ab'}
  prepare(inputs, output, train_tokenizer=400)
  return output


@pytest.fixture
def small(tmp_path, monkeypatch):
  """The inputs of a small dataset of many shards."""
  monkeypatch.setattr(prepare_lib, 'SHARD_BYTES', 2**15)
  return {'a': write_domains(tmp_path / 'small', 300) / 'a'}


def test_killed_and_rerun_gives_the_same_bytes(sources, undisturbed, tmp_path):
  output, partial = tmp_path / 'data', tmp_path / 'data.partial'
  flags = [f'--input={sources}', f'--output={output}', '--train_tokenizer=400']
  process = subprocess.Popen(command(*flags), stderr=subprocess.DEVNULL)
  while len(list(partial.glob('shards/*/*.tokens'))) < 1:
    assert process.poll() is None, 'finished before it could be killed'
    time.sleep(0.002)
  process.kill()
  process.wait()
  assert not output.exists()

  result = run(*flags)
  assert result.returncode == 0, result.stderr
  assert contents(output) == contents(undisturbed)
  assert not partial.exists()


def test_finished_shards_and_tokenizer_are_taken_over(small, tmp_path, monkeypatch):
  with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
    patch.setattr(prepare_lib, '_shuffle', lambda *args: 1 / 0)
    prepare(small, tmp_path / 'data', train_tokenizer=300)
  assert not (tmp_path / 'data').exists()
  *_, missing = sorted((tmp_path / 'data.partial').glob('shards/a/train-*.documents'))
  missing.unlink()
  written, write = [], shuffle.write_shard
  with monkeypatch.context() as patch:
    patch.setattr(training, 'train', lambda *args: 1 / 0)
    record = lambda path, *arrays: (written.append(path.name), write(path, *arrays))
    patch.setattr(shuffle, 'write_shard', record)
    prepare(small, tmp_path / 'data', train_tokenizer=300)
  assert written == [missing.stem] and written != ['train-000000']
  prepare(small, tmp_path / 'fresh', train_tokenizer=300)
  assert contents(tmp_path / 'data') == contents(tmp_path / 'fresh')


def test_another_plan_begins_anew(small, tmp_path, monkeypatch):
  with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
    patch.setattr(prepare_lib, '_shuffle', lambda *args: 1 / 0)
    prepare(small, tmp_path / 'data', train_tokenizer=300)
  for name in ('data', 'fresh'):
    prepare(small, tmp_path / name, train_tokenizer=301)
  assert contents(tmp_path / 'data') == contents(tmp_path / 'fresh')


def test_a_dataset_is_on_disk_before_it_has_its_name(tmp_path, undisturbed, monkeypatch):
  synced = set()
  monkeypatch.setattr(os, 'fsync', lambda file: synced.add(os.fstat(file).st_ino))
  (tmp_path / 'a.txt').write_text('text')
  rename = Path.rename

  def renamed(folder, target):
    if target == tmp_path / 'data':
      written = [folder, *folder.rglob('*')]
      assert len(written) > 4
      assert {path.stat().st_ino for path in written} <= synced
    return rename(folder, target)

  monkeypatch.setattr(Path, 'rename', renamed)
  options = dict(tokenizer=Tokenizer.load(undisturbed), valid_fraction=0)
  prepare({'a': tmp_path / 'a.txt'}, tmp_path / 'data', **options)
  assert (tmp_path / 'data').is_dir()


def test_two_at_once_are_refused(small, tmp_path, monkeypatch):
  def second(*args):
    with pytest.raises(UserError, match='Another prepare is running in .*data.partial'):
      prepare(small, tmp_path / 'data', train_tokenizer=300)
    raise ZeroDivisionError

  monkeypatch.setattr(prepare_lib, '_shuffle', second)
  with pytest.raises(ZeroDivisionError):
    prepare(small, tmp_path / 'data', train_tokenizer=300)


def test_already_prepared(sources, undisturbed):
  before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob('*')}
  inputs = {domain: sources / domain for domain in 'ab'}
  manifest = prepare(inputs, undisturbed, train_tokenizer=400)
  assert manifest == open_dataset(undisturbed).manifest
  assert before == {p: p.stat().st_mtime_ns for p in undisturbed.rglob('*')}
  for changed in (
    dict(inputs={'a': sources / 'a'}),
    dict(train_tokenizer=401),
    dict(valid_fraction=0.5),
    dict(train_tokenizer=None, tokenizer=Tokenizer.load(undisturbed)),
  ):
    options = dict(inputs=inputs, train_tokenizer=400) | changed
    with pytest.raises(UserError, match='from other inputs or options: choose another --output'):
      prepare(output=undisturbed, **options)


def test_valid_by_hash_is_stable_and_keeps_copies_together(tmp_path):
  texts = [f'text number {i}' for i in range(500)]
  sources = write_lines(tmp_path / 'a.jsonl', texts + texts[:100])
  prepare({'a': sources}, tmp_path / 'data', train_tokenizer=300, valid_fraction=0.1)
  train, valid = (texts_of(tmp_path / 'data', 'a', split) for split in ('train', 'valid'))
  assert sorted(train + valid) == sorted(texts + texts[:100])
  assert not set(train) & set(valid)
  assert 20 < len(set(valid)) < 90
  # Other documents beside it do not move a document to the other side.
  more = write_lines(tmp_path / 'b.jsonl', ['new'] * 5 + texts[::-1])
  prepare({'a': more}, tmp_path / 'more', train_tokenizer=300, valid_fraction=0.1)
  assert set(texts_of(tmp_path / 'more', 'a', 'valid')) - {'new'} == set(valid)


def test_marked_files_copies_empty_texts_and_what_is_left_out(tmp_path):
  write_lines(tmp_path / 'a/train.jsonl', ['one', 'held', 'two', '', 'two'])
  write_lines(tmp_path / 'a/valid.jsonl', ['held', ''])
  write_lines(tmp_path / 'a/test.jsonl', ['secret'])
  (tmp_path / 'a/odd.csv').write_text('x')
  write_lines(tmp_path / 'b.jsonl', ['three', 'held'])  # in valid of another domain
  inputs, how = {'a': tmp_path / 'a', 'b': tmp_path / 'b.jsonl'}, dict(train_tokenizer=300)
  with pytest.raises(UserError, match='a/odd.csv is none of .jsonl'):
    prepare(inputs, tmp_path / 'data', **how)
  manifest = prepare(inputs, tmp_path / 'data', **how, valid_fraction=0, skip_unknown=True)
  assert sorted(texts_of(tmp_path / 'data', 'a', 'train')) == ['one', 'two', 'two']
  assert texts_of(tmp_path / 'data', 'b', 'train') == ['three']
  assert texts_of(tmp_path / 'data', 'a', 'valid') == ['held']
  splits = manifest['domains']['a']
  assert splits['train']['skipped'] == {'empty': 1, 'in_valid': 1}
  assert splits['valid']['skipped'] == {'empty': 1, 'in_valid': 0}
  assert manifest['left_out'] == ['a/odd.csv', 'a/test.jsonl']
  files = [source['path'] for source in manifest['sources']]
  assert files == ['a/valid.jsonl', 'a/train.jsonl', 'b/b.jsonl']


def lossy():
  """A tokenizer that knows small letters and the space; the rest is lost without a word."""
  letters = {letter: i for i, letter in enumerate('abcdefghijklmnopqrstuvwxyz ')}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
  made.add_special_tokens(['<s>', '</s>'])
  made.decoder = tokenizers.decoders.Fuse()
  return Tokenizer(made.to_str().encode(), 'tokenizer.json')


def test_a_tokenizer_that_loses_text_is_told(tmp_path):
  def decoded(text, name, **options):
    source = write_lines(tmp_path / f'{name}.jsonl', [text] * 9)
    options |= dict(tokenizer=lossy(), valid_fraction=0)
    return prepare({'a': source}, tmp_path / name, **options)['decoded']['a']

  assert decoded('a whale', 'good') == 1
  (warning,) = prepare_lib.warnings({'decoded': {'a': 0.7, 'b': 1.0}, 'switched_off': []})
  assert warning == 'WARNING: the tokenizer reproduces only a part of the text in a (70.00%)'
  with pytest.raises(UserError, match='reproduces 70.0% of the text of a: .* --min_decoded=0.9'):
    decoded('abcdefgXYZ', 'bad')
  assert decoded('abcdefgXYZ', 'bad', min_decoded=0.5) == 0.7


def test_what_a_tokenizer_asks_for_in_vain_is_told(tmp_path):
  facts = json.loads(training.train(['the whale'], 270)._content)
  facts['model']['dropout'] = 0.3
  (tmp_path / 'tokenizer.json').write_text(json.dumps(facts))
  source = write_lines(tmp_path / 'a.jsonl', ['the whale'] * 9)
  how = dict(tokenizer=Tokenizer.load(tmp_path / 'tokenizer.json'), valid_fraction=0)
  manifest = prepare({'a': source}, tmp_path / 'data', **how)
  assert prepare_lib.warnings(manifest) == ['Switched off in the tokenizer: dropout.']


@pytest.mark.parametrize(
  'options, sentence',
  [
    (dict(), '--tokenizer=PATH and --train_tokenizer=SIZE'),
    (dict(train_tokenizer=300, valid_fraction=1.0), '--valid_fraction=1 must be'),
    (dict(train_tokenizer=300, text_field='body'), "line 1 has no field 'body'"),
    (dict(train_tokenizer=300, valid_fraction=1e-9), 'no document for valid: add a valid file'),
    (dict(train_tokenizer=300, valid_fraction=1 - 1e-9), 'no document left for train'),
  ],
)
def test_option_errors_leave_no_output(tmp_path, options, sentence):
  sources = write_lines(tmp_path / 'a.jsonl', ['one', 'two'])
  with pytest.raises(UserError, match=sentence):
    prepare({'a': sources}, tmp_path / 'data', **options)
  assert not (tmp_path / 'data').exists()


def test_a_valid_file_without_text(tmp_path):
  write_lines(tmp_path / 'a/train.jsonl', ['one'])
  write_lines(tmp_path / 'a/valid.jsonl', [''])
  with pytest.raises(UserError, match='no document for valid: its valid files have no text'):
    prepare({'a': tmp_path / 'a'}, tmp_path / 'data', train_tokenizer=300)


def test_path_errors(tmp_path):
  sources = write_lines(tmp_path / 'a' / 'x.jsonl', ['one', 'two']).parent
  with pytest.raises(UserError, match='is inside the input'):
    prepare({'a': sources}, sources / 'data', train_tokenizer=300)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine/precious.txt').write_text('x')
  with pytest.raises(UserError, match='exists and is not a prepared dataset'):
    prepare({'a': sources}, tmp_path / 'mine', train_tokenizer=300)
  with pytest.raises(UserError, match='cannot be written'):
    prepare({'a': sources}, '/proc/nowhere/data', train_tokenizer=300)
  write_lines(tmp_path / 'b' / 'test.jsonl', ['one'])
  with pytest.raises(UserError, match='holds only test files'):
    prepare({'b': tmp_path / 'b'}, tmp_path / 'data', train_tokenizer=300)


@pytest.mark.parametrize('name', ['link', 'link/../data'])  # itself, and beside where it leads
def test_links_are_followed(tmp_path, name):
  sources = write_lines(tmp_path / 'a.jsonl', ['one', 'two'])
  (tmp_path / 'disk/mine').mkdir(parents=True)
  (tmp_path / 'link').symlink_to('disk/mine')
  prepare({'a': sources}, tmp_path / name, train_tokenizer=300, valid_fraction=0)
  assert sorted(texts_of(tmp_path / name, 'a', 'train')) == ['one', 'two']
  assert (tmp_path / 'link').is_symlink() and not list(tmp_path.rglob('*.partial'))


def test_command_line(tmp_path):
  write_lines(tmp_path / 'in/a/x.jsonl', [f'text {i}' for i in range(300)])
  write_lines(tmp_path / 'in/a/test.jsonl', ['secret'])
  flags = (f'--input={tmp_path}/in', f'--output={tmp_path}/data', '--train_tokenizer=300')
  for already in (False, True):
    result = run(*flags, '--json=-')
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts['already_prepared'] is already
    assert facts['domains'] == open_dataset(tmp_path / 'data').manifest['domains']
    assert 'bytes/token' in result.stderr and 'a/test.jsonl' in result.stderr
  result = run(
    flags[0], f'--output={tmp_path}/b', f'--tokenizer={lossy().save(tmp_path)}', '--min_decoded=0'
  )
  assert result.returncode == 0 and 'only a part of the text in a (65.50%)' in result.stderr
  result = run(*flags[:2], '--bos_token=x')
  assert result.returncode == 2 and 'require --tokenizer=PATH' in result.stderr
