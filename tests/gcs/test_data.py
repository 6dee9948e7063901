"""A dataset in a bucket: prepared there, read there in place, and nothing of it is kept here."""

import numpy as np
import pytest

from bam_jax import config
from bam_jax.data import mixture
from bam_jax.errors import UserError
from bam_jax.prepare import recipe_data
from tests.gcs.conftest import files

pytestmark = pytest.mark.slow


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A machine that has seen nothing."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'a home'))
  return tmp_path / 'a home'


def opened(text, path):
  how = config.Prepare(input=str(text), train_tokenizer=300)
  return recipe_data.open_dataset(config.Data(path=str(path), sequence_length=16, prepare=how))


def batch(dataset):
  documents = {name: dataset.documents(name, 'train') for name in dataset.domains}
  weights = dict.fromkeys(documents, 1.0)
  return mixture.batches(documents, weights, sequence_length=16, batch_size=8, seed=0)[3]


def test_a_recipe_prepares_into_a_bucket_and_reads_it_there(cache, folder, text, tmp_path):
  local, mine = opened(text, tmp_path / 'data'), opened(text, folder / 'data')
  assert mine.manifest == local.manifest and mine.path == folder / 'data'
  here = {str(p.relative_to(local.path)) for p in local.path.rglob('*') if p.is_file()}
  assert set(files(folder / 'data')) == here
  for name in here:
    assert (folder / 'data' / name).read_bytes() == (local.path / name).read_bytes()
  assert not [path for path in cache.rglob('*') if path.is_file()]
  for key, value in batch(local).items():
    np.testing.assert_array_equal(batch(mine)[key], value)
  (folder / 'data' / 'code' / 'train' / 'tokens' / 'c' / '0' / '0').unlink()
  with pytest.raises(UserError, match='gs://.*code/train/tokens is damaged or not whole'):
    opened(text, folder / 'data')
