"""The prepared dataset: what is written is what is read, and damage is named."""

import json
import shutil

import numpy as np
import pytest

from bam_jax.data import store
from bam_jax.data.store import open_dataset
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.prepare import dataset, shuffle
from bam_jax.prepare.dataset import prepare

TEXTS = [f'Document {i} of the law: {"word " * (i % 7)}é' for i in range(60)]
SPLITS = {'train': TEXTS[:50], 'valid': TEXTS[50:]}


def write_lines(folder, splits):
  folder.mkdir(parents=True)
  for split, texts in splits.items():
    lines = ''.join(json.dumps({'text': text}) + '\n' for text in texts)
    (folder / f'{split}.jsonl').write_text(lines)
  return folder


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A dataset of several shards, chunks and partitions, and documents across all of their ends."""
  root = tmp_path_factory.mktemp('made')
  write_lines(root / 'law', SPLITS)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(dataset, 'SHARD_BYTES', 600)
    patch.setattr(shuffle, 'CHUNK', 32)
    patch.setattr(shuffle, 'SHARD', 256)
    patch.setattr(shuffle, 'PARTITION_TOKENS', 300)
    prepare({'law': root / 'law'}, root / 'data', train_tokenizer=270)
  return root / 'data'


@pytest.fixture
def copy(made, tmp_path):
  return shutil.copytree(made, tmp_path / 'data')


def edit_json(path, change):
  facts = json.loads(path.read_text())
  change(facts)
  path.write_text(json.dumps(facts))


def test_documents_come_back_in_another_order(made, monkeypatch):
  monkeypatch.setattr(store, 'BLOCK', 100)
  found = open_dataset(made)
  assert found.domains == ('law',) and found.splits('law') == ('train', 'valid')
  tokenizer = found.tokenizer()
  assert tokenizer.hash == found.tokenizer_hash == found.manifest['tokenizer']['hash']
  for split, texts in SPLITS.items():
    documents = found.documents('law', split)
    ids = {text: [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts}
    order = [tokenizer.decode(document) for document in documents]
    assert sorted(order) == sorted(texts) and order != texts
    for document, text in zip(documents, order, strict=True):
      assert document.dtype == np.int32 and document.tolist() == ids[text]
    sizes = [len(text.encode()) for text in order]
    np.testing.assert_array_equal(documents.byte_counts(), sizes)
    np.testing.assert_array_equal(documents.byte_counts(7), sizes[:7])
    assert documents.byte_counts().dtype == np.int64
    entry = found.manifest['domains']['law'][split]
    sums = len(texts), sum(map(len, ids.values())), sum(sizes)
    assert (documents.num_documents, documents.num_tokens, documents.num_bytes) == sums
    assert tuple(entry[key] for key in store.SUMS) == sums
  assert len(list((made / 'law/train/tokens/c/0').iterdir())) > 3


def test_pieces_of_several_documents(made):
  found = open_dataset(made)
  whole = {
    split: np.concatenate([[d, np.arange(len(d)) == 0] for d in found.documents('law', split)], 1)
    for split in SPLITS
  }
  places = [('train', 0), ('valid', 31), ('train', 255), ('train', 1), ('train', 10**6)]
  places.append(('valid', whole['valid'].shape[1] - 5))
  opened = {split: found.documents('law', split) for split in SPLITS}
  ids, begins = store.read([(opened[split], start) for split, start in places], 40)
  assert ids.dtype == np.int32 and begins.dtype == bool
  for row, (split, start) in enumerate(places):
    wanted = np.zeros((2, 40), np.int32)
    piece = whole[split][:, start : start + 40]
    wanted[:, : piece.shape[1]] = piece
    np.testing.assert_array_equal([ids[row], begins[row]], wanted)


def read_all(folder):
  documents = open_dataset(folder).documents('law', 'train')
  return list(documents), documents.byte_counts()


@pytest.mark.parametrize('name', ['tokens', 'bytes'])
def test_damaged_arrays(copy, name):
  folder = copy / 'law/train' / name
  shards = sorted(path for path in (folder / 'c').rglob('*') if path.is_file())
  for path in (shards[0], shards[-1], folder / 'zarr.json'):
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match=f'{folder} is damaged or not whole .*: copy or prepare'):
      read_all(copy)
    path.write_bytes(whole[:-8])
    with pytest.raises(UserError, match=f'{folder} is damaged or not whole'):
      read_all(copy)
    if path.name != 'zarr.json':
      for place in range(0, len(whole), 7):  # chunks, and the index
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(UserError, match=f'{folder} is damaged or not whole'):
          read_all(copy)
    path.write_bytes(whole)
  read_all(copy)
  edit_json(folder / 'zarr.json', lambda facts: facts['shape'].append(facts['shape'].pop() - 1))
  with pytest.raises(UserError, match='holds uint.* where manifest.json promises'):
    open_dataset(copy)


def test_tokenizer_and_manifest_must_be_there(copy):
  path = copy / 'tokenizer.json'
  path.write_text(path.read_text() + '\n')
  with pytest.raises(UserError, match='tokenizer.json is missing or not the tokenizer of'):
    open_dataset(copy)
  (copy / 'manifest.json').write_text('{"format": 2')
  with pytest.raises(UserError, match='manifest.json cannot be read'):
    open_dataset(copy)
  with pytest.raises(UserError, match='is not a prepared dataset .*bam_jax.prepare'):
    open_dataset(copy / 'law')


@pytest.mark.parametrize(
  'change',
  [
    lambda m: m.pop('format'),
    lambda m: m['tokenizer'].update(vocab_size='270'),
    lambda m: m['domains']['law']['train'].pop('tokens'),
    lambda m: m['domains']['law']['train'].update(bytes=0),
  ],
)
def test_damaged_manifest(copy, change):
  edit_json(copy / 'manifest.json', change)
  with pytest.raises(UserError, match='manifest.json is damaged'):
    open_dataset(copy)


def test_another_format(copy):
  for version, fix in ((1, 'prepare the dataset again'), (3, 'upgrade bam_jax')):
    edit_json(copy / 'manifest.json', lambda facts, version=version: facts.update(format=version))
    with pytest.raises(UserError, match=f'has format {version}, and this version reads 2: {fix}'):
      open_dataset(copy)


def test_domains_of_several_datasets(made, tmp_path):
  """A domain is added without preparing the others again."""
  more = write_lines(tmp_path / 'text', {'train': TEXTS[:9], 'valid': TEXTS[9:12]})
  prepare({'code': more}, tmp_path / 'code', tokenizer=Tokenizer.load(made))
  found = open_dataset(made)
  found.add(open_dataset(tmp_path / 'code'))
  assert found.domains == ('code', 'law') and found.path == made
  assert found.documents('code', 'train').num_documents == 9
  assert found.documents('law', 'train').num_documents == 50
  with pytest.raises(UserError, match='/data has the domain law, as .*/data has: rename one'):
    found.add(open_dataset(made))
  facts = json.loads((made / 'tokenizer.json').read_text())
  facts['model']['vocab'] |= {f'word {n}': n for n in range(270, 2**16 + 1)}
  longer = Tokenizer(json.dumps(facts).encode(), 'tokenizer.json')
  prepare({'art': more}, tmp_path / 'art', tokenizer=longer)
  found.add(open_dataset(tmp_path / 'art'))  # of 32 bits, beside 16
  assert len([*found.documents('art', 'train')]) == 9 and found.vocab_size == 2**16 + 1
  assert found.documents('law', 'train').num_documents == 50
  prepare({'both': more}, tmp_path / 'both', tokenizer=Tokenizer.load(made, '<|eos|>', '<|eos|>'))
  with pytest.raises(UserError, match="with another tokenizer .*bos_token is '<.bos.>' in one"):
    found.add(open_dataset(tmp_path / 'both'))
  prepare({'math': more}, tmp_path / 'math', train_tokenizer=260)
  with pytest.raises(UserError, match='math was prepared with another tokenizer than .*data'):
    found.add(open_dataset(tmp_path / 'math'))
