"""The prepared dataset: what is written is what is read, and damage is named."""

import json
import shutil

import numpy as np
import pytest

from bam_jax.data import shards
from bam_jax.data.shards import open_dataset
from bam_jax.errors import UserError
from bam_jax.prepare import dataset
from bam_jax.prepare.dataset import prepare

TEXTS = [f'Document {i} of the law: {"word " * (i % 7)}é' for i in range(60)]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  root = tmp_path_factory.mktemp('made')
  (root / 'law').mkdir()
  for split, texts in (('train', TEXTS[:50]), ('valid', TEXTS[50:])):
    lines = ''.join(json.dumps({'text': text}) + '\n' for text in texts)
    (root / 'law' / f'{split}.jsonl').write_text(lines)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(dataset, 'SHARD_BYTES', 600)
    prepare({'law': root / 'law'}, root / 'data', train_tokenizer=270)
  return root / 'data'


@pytest.fixture
def copy(made, tmp_path):
  return shutil.copytree(made, tmp_path / 'data')


def edit_manifest(folder, change):
  path = folder / 'manifest.json'
  manifest = json.loads(path.read_text())
  change(manifest)
  path.write_text(json.dumps(manifest))


def test_documents_come_back(made):
  found = open_dataset(made)
  assert found.domains == ('law',) and found.splits('law') == ('train', 'valid')
  tokenizer = found.tokenizer()
  assert tokenizer.hash == found.tokenizer_hash == found.manifest['tokenizer']['hash']
  for split, texts in (('train', TEXTS[:50]), ('valid', TEXTS[50:])):
    documents = found.documents('law', split)
    assert len(documents) == len(texts)
    wanted = [[tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_id] for t in texts]
    for document, ids in zip(documents, wanted, strict=True):
      assert document.dtype == np.uint16 and document.tolist() == ids
    np.testing.assert_array_equal(documents.lengths, [len(ids) for ids in wanted])
    np.testing.assert_array_equal(documents.byte_counts, [len(t.encode()) for t in texts])
    assert documents.lengths.dtype == documents.byte_counts.dtype == np.int64
    assert documents.num_tokens == sum(map(len, wanted))
    entry = found.manifest['domains']['law'][split]
    assert entry['tokens'] == documents.num_tokens and entry['documents'] == len(texts)
    assert entry['bytes'] == documents.byte_counts.sum()
  assert len(found.manifest['domains']['law']['train']['shards']) > 2
  found.verify()


def test_read_is_a_slice(made):
  documents = open_dataset(made).documents('law', 'train')
  for index in (0, 17, 49):
    whole = documents[index]
    np.testing.assert_array_equal(documents.read(index, 2, 5), whole[2:5])
    assert documents.read(index, 3, 3).size == 0
    for start, stop in ((-1, 2), (3, 2), (0, len(whole) + 1)):
      with pytest.raises(IndexError):
        documents.read(index, start, stop)
  for index in (-1, 50):
    with pytest.raises(IndexError):
      documents[index]


def shard_file(folder, part):
  return sorted((folder / 'law').glob(f'train-00000-*.{part}.npy'))[0]


@pytest.mark.parametrize('part', shards.PARTS)
def test_damaged_files(copy, part):
  path = shard_file(copy, part)
  whole = path.read_bytes()
  array = np.load(path)

  def refused(sentence):
    with pytest.raises(UserError, match=f'{path.name} {sentence}'):
      open_dataset(copy)

  path.write_bytes(whole[:-8])
  refused('is cut short')
  np.save(path, array[:-1])
  refused('holds .* promises')
  np.save(path, array.astype(np.int32))
  refused('holds int32.* promises')
  np.save(path, np.array([{'evil': 1}], dtype=object), allow_pickle=True)
  refused('is cut short or not an array')
  path.unlink()
  refused('is missing')

  changed = bytearray(whole)
  changed[-1] ^= 1
  path.write_bytes(changed)
  if part != 'ends':  # the wrong end is noticed without checksums
    open_dataset(copy)
    with pytest.raises(UserError, match=f'{path.name} has changed'):
      open_dataset(copy).verify()


def test_ends_must_divide_the_tokens(copy):
  path = shard_file(copy, 'ends')
  ends = np.load(path)
  for wrong in (np.where(ends == ends[-1], ends[-1] + 1, ends), np.roll(ends, 1), ends[::-1]):
    np.save(path, wrong)
    with pytest.raises(UserError, match='does not divide .* into documents'):
      open_dataset(copy)


def test_tokenizer_and_manifest_must_be_there(copy):
  path = copy / 'tokenizer.json'
  path.write_text(path.read_text() + '\n')
  with pytest.raises(UserError, match='tokenizer.json is missing or not the tokenizer of'):
    open_dataset(copy)
  (copy / 'manifest.json').write_text('{"format": 1')
  with pytest.raises(UserError, match='manifest.json cannot be read'):
    open_dataset(copy)
  with pytest.raises(UserError, match='is not a prepared dataset .*bam_jax.prepare'):
    open_dataset(copy / 'law')


def shard(manifest):
  return manifest['domains']['law']['train']['shards'][0]


@pytest.mark.parametrize(
  'change',
  [
    lambda m: m.pop('format'),
    lambda m: m['tokenizer'].update(vocab_size='270'),
    lambda m: shard(m).pop('tokens'),
  ],
)
def test_damaged_manifest(copy, change):
  edit_manifest(copy, change)
  with pytest.raises(UserError, match='manifest.json is damaged'):
    open_dataset(copy)
