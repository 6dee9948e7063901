"""A dataset in a bucket: prepared once, copied to every machine that reads it, and no further."""

import numpy as np
import pytest

from bam_jax import config
from bam_jax.data import remote, shards
from bam_jax.errors import UserError
from bam_jax.files import buckets
from bam_jax.prepare import recipe_data
from tests.gcs.conftest import files

pytestmark = pytest.mark.slow


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A machine that has seen nothing."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'a home'))
  return tmp_path / 'a home' / 'bam_jax' / 'data'


@pytest.fixture
def published(folder, dataset):
  """The tests' dataset as a user copies it there, with whatever else lies beside it."""
  names = [str(p.relative_to(dataset.path)) for p in dataset.path.rglob('*') if p.is_file()]
  buckets.send(dataset.path, folder / 'data', names)
  (folder / 'data' / 'notes.txt').write_text('not of the dataset')
  return folder / 'data'


def test_a_machine_copies_it_once(cache, published, dataset):
  copy = remote.fetch(published)
  mine = shards.open_dataset(copy)
  mine.verify()
  assert mine.manifest == dataset.manifest and copy.parent == cache
  document = mine.documents('law', 'train')[3]
  np.testing.assert_array_equal(document, dataset.documents('law', 'train')[3])
  assert not (copy / 'notes.txt').exists()
  before = {path: path.stat().st_mtime_ns for path in copy.rglob('*')}
  assert remote.fetch(published) == copy
  assert before == {path: path.stat().st_mtime_ns for path in copy.rglob('*')}
  assert sorted(path.name for path in cache.iterdir()) == [copy.name, f'{copy.name}.lock']


@pytest.mark.parametrize('what', ['nothing', 'a file less'])
def test_what_cannot_be_copied_is_one_sentence(cache, published, what):
  sentence = 'lacks a file .*: copy the dataset there again'
  if what == 'nothing':
    (published / shards.MANIFEST).unlink()
    sentence = 'is not a prepared dataset'
  else:
    (published / 'law' / next(n for n in files(published / 'law'))).unlink()
  with pytest.raises(UserError, match=sentence):
    remote.fetch(published)


def test_a_recipe_prepares_into_a_bucket_the_same_bytes(cache, folder, text, tmp_path):
  def opened(path):
    how = config.Prepare(input=str(text), train_tokenizer=300)
    return recipe_data.open_dataset(config.Data(path=str(path), sequence_length=16, prepare=how))

  local, mine = opened(tmp_path / 'data'), opened(folder / 'data')
  assert mine.manifest == local.manifest and mine.path.is_relative_to(cache)
  here = {str(p.relative_to(local.path)) for p in local.path.rglob('*') if p.is_file()}
  assert set(files(folder / 'data')) == here
  for name in here:
    assert (folder / 'data' / name).read_bytes() == (local.path / name).read_bytes()
  assert [path.name for path in cache.iterdir() if path.is_dir()] == [mine.path.name]
