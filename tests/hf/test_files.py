"""Folders of safetensors: what is read is what lies there; whatever is odd about it is named."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bam_jax.checkpoint.arrays import Spec
from bam_jax.errors import UserError
from bam_jax.hf import files
from tests.hf.folders import read_json, write_json

INDEX = 'model.safetensors.index.json'
A, B = 'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'


def tensors() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    'a': rng.normal(size=(5, 3)).astype(np.float32),
    'b': rng.normal(size=(3,)).astype(ml_dtypes.bfloat16),
    'c': rng.normal(size=(2, 2, 3)).astype(np.float16),
    'd': rng.normal(size=(7, 1)).astype(np.float32),
  }


@pytest.fixture
def folder(tmp_path):
  """Two files and an index."""
  values = tensors()
  save_file({name: values[name] for name in 'ab'}, tmp_path / A)
  save_file({name: values[name] for name in 'cd'}, tmp_path / B)
  write_json(tmp_path / INDEX, {'weight_map': dict(a=A, b=A, c=B, d=B)})
  return tmp_path


def change_index(folder, **changes) -> None:
  index = read_json(folder / INDEX)['weight_map'] | changes
  index = {name: file for name, file in index.items() if file is not None}
  write_json(folder / INDEX, {'weight_map': index})


def test_one_file_and_several_and_links_read_alike(folder, tmp_path_factory):
  single, linked = (tmp_path_factory.mktemp(name) for name in ('single', 'linked'))
  save_file(tensors(), single / 'model.safetensors')
  (folder / INDEX).write_text(f'\ufeff{(folder / INDEX).read_text()}')  # as some editors do
  for file in folder.iterdir():  # as in a cache of downloads
    (linked / file.name).symlink_to(file)
  for reader in map(files.Reader, (folder, single, linked)):
    assert reader.specs == {k: Spec(v.shape, v.dtype) for k, v in tensors().items()}
    for name, array in tensors().items():
      read = reader.read(name)
      assert read.dtype == array.dtype and read.tobytes() == array.tobytes()


@pytest.mark.parametrize('changes, named', [
  (dict(b=None), f'maps b to None; it is in {A}'),
  (dict(z=B), f'maps z to {B}; it is in None'),
  (dict(b=B), f'maps b to {B}; it is in {A}'),
  (dict(z='other.safetensors'), 'has no other.safetensors'),
])  # fmt: skip
def test_an_index_that_does_not_fit_its_files(folder, changes, named):
  change_index(folder, **changes)
  with pytest.raises(UserError, match=named):
    files.Reader(folder)


def test_files_without_their_index(folder):
  (folder / INDEX).unlink()
  with pytest.raises(UserError, match='has no model.safetensors'):
    files.Reader(folder)


@pytest.mark.parametrize('dtype', [np.float64, np.int8, np.int64, ml_dtypes.float8_e4m3fn])
def test_numbers_that_our_checkpoints_cannot_hold(tmp_path, dtype):
  save_file({'x': np.ones(3, dtype)}, tmp_path / 'model.safetensors')
  with pytest.raises(UserError, match='has x in .*not in F32, BF16, F16'):
    files.Reader(tmp_path)


@pytest.mark.parametrize('most, count', [('2KB', 4), ('4KB', 3), ('10KB', 1)])
def test_what_is_written_is_what_others_read(tmp_path, most, count):
  kinds = {3: ml_dtypes.bfloat16, 5: np.float32, 7: np.float16, 9: np.float32}
  values = {f'{n}': np.full((n, 101), n, dtype) for n, dtype in kinds.items()}
  specs = {name: Spec(array.shape, array.dtype) for name, array in values.items()}
  shards = files.plan(specs, most)
  assert len(shards) == count
  files.write(
    tmp_path, shards, specs, (values[name] for shard in shards.values() for name in shard)
  )
  assert {path.name for path in tmp_path.glob('*.safetensors')} == set(shards)
  assert (tmp_path / INDEX).exists() == (count > 1)
  read = {}
  for file in shards:
    part = load_file(tmp_path / file)
    read |= part
    size = sum(array.nbytes for array in part.values())
    assert size <= int(most[:-2]) * 1000 or len(part) == 1
    content = (tmp_path / file).read_bytes()
    length = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8 : 8 + length])
    assert header.pop('__metadata__') == {'format': 'pt'} and (8 + length) % 8 == 0
    for name, facts in header.items():  # values lie aligned
      assert facts['data_offsets'][0] % values[name].dtype.itemsize == 0
  bits = lambda arrays: {name: (x.dtype, x.tobytes()) for name, x in arrays.items()}
  assert bits(read) == bits(values)
  assert files.Reader(tmp_path).specs == specs
