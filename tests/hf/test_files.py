"""Folders of safetensors: what is read is what lies there; whatever is odd about it is named."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
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


def test_one_file_and_several_read_alike(folder, tmp_path_factory):
  single = tmp_path_factory.mktemp('single')
  save_file(tensors(), single / 'model.safetensors')
  for reader, count in ((files.Reader(folder), 2), (files.Reader(single), 1)):
    assert len(reader.files) == count
    assert reader.specs == {k: Spec(v.shape, v.dtype) for k, v in tensors().items()}
    for name, array in tensors().items():
      read = reader.read(name)
      assert read.dtype == array.dtype and read.tobytes() == array.tobytes()


def test_files_may_be_links_as_in_a_cache_of_downloads(folder, tmp_path_factory):
  linked = tmp_path_factory.mktemp('linked')
  for file in folder.iterdir():
    (linked / file.name).symlink_to(file)
  assert files.Reader(linked).specs == files.Reader(folder).specs


@pytest.mark.parametrize(
  'file', ['../x.safetensors', '/etc/x.safetensors', 'a/../b.safetensors', 'x.bin', '.', 7, None]
)
def test_an_index_reaches_no_other_folder(folder, file):
  save_file({'z': np.zeros(1, np.float32)}, folder.parent / 'x.safetensors')
  index = read_json(folder / INDEX)
  index['weight_map']['z'] = file
  write_json(folder / INDEX, index)
  with pytest.raises(UserError, match='puts z into .*no file of this folder'):
    files.Reader(folder)


@pytest.mark.parametrize(
  'changes, named',
  [
    (dict(b=None), f'{A} has b, which .* does not name'),
    (dict(z=B), f'{B} lacks z'),
    (dict(b=B), f'{B} lacks b'),
    (dict(z='other.safetensors'), 'holds no other.safetensors'),
  ],
)
def test_an_index_that_does_not_fit_its_files(folder, changes, named):
  change_index(folder, **changes)
  with pytest.raises(UserError, match=named):
    files.Reader(folder)


def test_a_tensor_in_two_files(folder):
  values = tensors()
  save_file({name: values[name] for name in 'bcd'}, folder / B)
  with pytest.raises(UserError, match=f'b is in {A} and again in {B}'):
    files.Reader(folder)


@pytest.mark.parametrize('text', ['{', '[]', '{}', '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_that_is_none(folder, text):
  (folder / INDEX).write_text(text)
  with pytest.raises(UserError, match='index.json'):
    files.Reader(folder)


def test_an_index_that_names_a_tensor_twice(folder):
  (folder / INDEX).write_text(f'{{"weight_map": {{"a": "{A}", "a": "{B}"}}}}')
  with pytest.raises(UserError, match="it has 'a' twice"):
    files.Reader(folder)


def test_files_that_nothing_names(folder):
  save_file(tensors(), folder / 'model.safetensors')
  with pytest.raises(UserError, match='model.safetensors beside'):
    files.Reader(folder)
  (folder / 'model.safetensors').rename(folder / 'adapter_model.safetensors')
  with pytest.raises(UserError, match='adapter_model.safetensors beside'):
    files.Reader(folder)


def test_several_files_without_their_index(folder):
  (folder / INDEX).unlink()
  with pytest.raises(UserError, match=f'no model.safetensors, though {A}'):
    files.Reader(folder)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt', 'consolidated.00.pth'])
def test_pickles_are_not_opened(tmp_path, name):
  class Trap:
    def __reduce__(self):
      return (tmp_path / 'sprung').touch, ()

  import pickle

  (tmp_path / name).write_bytes(pickle.dumps(Trap()))
  with pytest.raises(UserError, match=f'{name} and no safetensors'):
    files.Reader(tmp_path)
  assert not (tmp_path / 'sprung').exists()


def test_a_folder_without_a_model(tmp_path):
  with pytest.raises(UserError, match='holds no model.safetensors'):
    files.Reader(tmp_path)


@pytest.mark.parametrize('cut', [0, 5, 40, -4])
def test_a_file_that_is_cut_short(folder, cut):
  content = (folder / B).read_bytes()
  (folder / B).write_bytes(content[:cut])
  with pytest.raises(UserError, match=f'{B} cannot be read .*damaged'):
    files.Reader(folder)


@pytest.mark.parametrize(
  'header, values',
  [
    ({'x': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 4]}}, 4),  # too few values
    ({'x': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}}, 8),  # values of no tensor
    (
      {
        'x': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]},
        'y': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]},
      },
      4,
    ),  # two tensors on the same values
  ],
)
def test_a_header_that_does_not_fit_its_values(tmp_path, header, values):
  text = json.dumps(header).encode()
  content = struct.pack('<Q', len(text)) + text + bytes(values)
  (tmp_path / 'model.safetensors').write_bytes(content)
  with pytest.raises(UserError, match='model.safetensors cannot be read'):
    files.Reader(tmp_path)


@pytest.mark.parametrize('dtype', [np.float64, np.int8, np.int64, ml_dtypes.float8_e4m3fn])
def test_numbers_that_our_checkpoints_cannot_hold(tmp_path, dtype):
  save_file({'x': np.ones(3, dtype)}, tmp_path / 'model.safetensors')
  with pytest.raises(UserError, match='has x in .*only F32, BF16, F16'):
    files.Reader(tmp_path)


def write(folder, values, most) -> files.Writer:
  writer = files.Writer(folder, {k: Spec(v.shape, v.dtype) for k, v in values.items()}, most)
  for name in reversed(values):  # in any order
    writer.write(name, values[name])
  writer.finish()
  return writer


@pytest.mark.parametrize('most, count', [(1, 4), (50, 3), (70, 2), (117, 2), (118, 1), (10**9, 1)])
def test_what_is_written_is_what_others_read(tmp_path, most, count):
  values = tensors()
  writer = write(tmp_path, values, most)
  assert len(writer.files) == count
  assert {path.name for path in tmp_path.glob('*.safetensors')} == set(writer.files)
  assert (tmp_path / INDEX).exists() == (count > 1)
  read = {}
  for file in writer.files:
    part = load_file(tmp_path / file)
    size = sum(array.nbytes for array in part.values())
    assert size <= most or len(part) == 1
    read |= part
    with safe_open(tmp_path / file, 'numpy') as opened:
      assert opened.metadata() == {'format': 'pt'}
  assert {name: (x.dtype, x.tobytes()) for name, x in read.items()} == {
    name: (x.dtype, x.tobytes()) for name, x in values.items()
  }
  assert files.Reader(tmp_path).specs.keys() == values.keys()


def test_values_lie_aligned_whatever_their_order(tmp_path):
  values = {'odd': np.ones(3, ml_dtypes.bfloat16), 'wide': np.ones(2, np.float32)}
  write(tmp_path, values, 10**9)
  content = (tmp_path / 'model.safetensors').read_bytes()
  length = int.from_bytes(content[:8], 'little')
  header = json.loads(content[8 : 8 + length])
  assert (8 + length) % 8 == 0
  assert header['wide']['data_offsets'][0] % 4 == 0


def test_a_writer_takes_every_tensor_once_and_as_promised(tmp_path):
  values = tensors()
  writer = files.Writer(tmp_path, {k: Spec(v.shape, v.dtype) for k, v in values.items()}, 10**9)
  writer.write('a', values['a'])
  with pytest.raises(ValueError, match='a is written twice'):
    writer.write('a', values['a'])
  with pytest.raises(ValueError, match='d is'):
    writer.write('d', values['d'].T)
  with pytest.raises(ValueError, match='c is'):
    writer.write('c', values['c'].astype(np.float32))
  with pytest.raises(ValueError, match='d, b, c was not written'):
    writer.finish()
