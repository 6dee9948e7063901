"""Arrays on disk in pieces: what Orbax wrote is read, and what is written Orbax restores."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.model import transformer
from bam_jax.parallel import sharding

BFLOAT16 = np.dtype(jnp.bfloat16)
FLOAT32 = np.dtype(np.float32)
UP = 'blocks/ffn/up'
SPECS = {
  'embed/table': arrays.Spec((37, 24), FLOAT32),
  'unembed/kernel': arrays.Spec((24, 37), FLOAT32),
  'final_norm/scale': arrays.Spec((24,), FLOAT32),
  'blocks/norm/scale': arrays.Spec((3, 24), FLOAT32),
  UP: arrays.Spec((3, 5, 24, 26), BFLOAT16),
  'blocks/attention/key': arrays.Spec((3, 24, 2, 7), FLOAT32),
  'blocks/ffn/router': arrays.Spec((3, 24, 5), FLOAT32),
}


def draw(specs=SPECS) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {path: rng.normal(size=spec.shape).astype(spec.dtype) for path, spec in specs.items()}


def write(folder, values, order=lambda jobs: jobs) -> None:
  """All values in pieces."""
  specs = {path: arrays.Spec(array.shape, array.dtype) for path, array in values.items()}
  with arrays.Writer(folder, specs) as writer:
    for path, index in order([(p, i) for p, spec in specs.items() for i in arrays.pieces(p, spec)]):
      writer.write(path, index, values[path][index])


@pytest.fixture
def small_chunks(monkeypatch):
  """Chunks of 600 bytes: tiny arrays have many."""
  monkeypatch.setattr(arrays, 'CHUNK_BYTES', 600)
  monkeypatch.setattr(arrays, 'PENDING_BYTES', 1000)
  monkeypatch.setattr(arrays, 'READ_BYTES', 1000)


@pytest.mark.parametrize('place', ['disk', 'bucket'])
def test_what_is_written_is_read(small_chunks, tmp_path, place, request):
  """On a disk and in a bucket, by the same code."""
  folder = tmp_path if place == 'disk' else request.getfixturevalue('folder')
  values = draw()
  write(folder / 'a b' / 'params', values, order=lambda jobs: reversed(jobs))
  reader = arrays.Reader(folder / 'a b' / 'params')
  assert reader.specs == SPECS
  for path, want in values.items():
    np.testing.assert_array_equal(reader.read(path), want, strict=True)
  np.testing.assert_array_equal(reader.read(UP, (1, 2)), values[UP][1, 2])
  odd = (slice(0, 3), 4, slice(5, 23), slice(1, 2))
  np.testing.assert_array_equal(reader.read(UP, odd), values[UP][odd])
  requests = [(path, index) for path in SPECS for index in arrays.pieces(path, SPECS[path])]
  regions = arrays.read_ahead((reader, path, index) for path, index in requests)
  for (path, index), region in zip(requests, regions, strict=True):
    np.testing.assert_array_equal(region, values[path][index])
  with pytest.raises(UserError, match='holds no arrays|damaged'):
    arrays.Reader(folder / 'other' / 'params')


def test_orbax_restores_what_is_written_on_any_mesh(small_chunks, tmp_path):
  values = draw()
  write(tmp_path / 'params', values)
  mesh = sharding.make_mesh(config.Mesh(1, 2, 4, 1))
  layouts = {path: P() for path in SPECS} | {'unembed/kernel': P('expert'), 'embed/table': P()}
  wanted = {
    path: jax.ShapeDtypeStruct(spec.shape, FLOAT32, sharding=NamedSharding(mesh, layouts[path]))
    for path, spec in SPECS.items()
  }
  wanted = traverse_util.unflatten_dict(wanted, sep='/')
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    restored = checkpointer.restore(
      tmp_path / 'params',
      ocp.args.PyTreeRestore(wanted, ocp.checkpoint_utils.construct_restore_args(wanted)),
    )
  for path, got in traverse_util.flatten_dict(restored, sep='/').items():
    np.testing.assert_array_equal(got, values[path].astype(np.float32), strict=True)
    assert got.sharding.spec == layouts[path]


def abstract(model: config.Model, shape) -> dict:
  mesh = sharding.make_mesh(config.Mesh(*shape))
  params = transformer.Network(model, config.Compute()).abstract()
  return sharding.abstract(params, sharding.tree(params, mesh))


@pytest.mark.parametrize(
  'shape', [pytest.param((1, 2, 2, 2), marks=pytest.mark.slow), (2, 4, 1, 1)], ids=str
)
@pytest.mark.parametrize('small', [True, False])
def test_checkpoints_of_training_are_read(tmp_path, models, monkeypatch, shape, small):
  """A layer at a time, without reading another; and Orbax restores them on another mesh."""
  if small:  # or every array is one chunk, the whole of its shard
    monkeypatch.setattr(arrays, 'CHUNK_BYTES', 2000)
  model, rng = models['bam_kv_experts'], np.random.default_rng(1)
  params = jax.tree.map(
    lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding),
    abstract(model, shape),
  )
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
  checkpoints.save(1, params, {'count': np.zeros(())}, {}, None)
  checkpoints.close()
  reader = arrays.Reader(tmp_path / '1' / 'params')
  flat = traverse_util.flatten_dict(params, sep='/')
  assert sorted(reader.specs) == sorted(flat)
  for path, want in flat.items():
    for index in arrays.pieces(path, reader.specs[path]):
      np.testing.assert_array_equal(reader.read(path, index), want[index], strict=True)
  if small:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      stored = checkpointer.metadata(tmp_path / '1' / 'params').item_metadata.tree
    assert stored['blocks']['ffn']['up'].storage.chunk_shape[:2] == (1, 1)
    assert np.prod(stored['embed']['table'].storage.chunk_shape) <= 500
  restored = checkpoint.restore_params(tmp_path, abstract(model, (1, 2, 4, 1)))
  jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_what_was_never_written_is_an_error(small_chunks, tmp_path):
  values = draw()[UP]
  with pytest.raises(ValueError, match='not written whole'):
    with arrays.Writer(tmp_path / 'params', {UP: SPECS[UP]}) as writer:
      for layer in (0, 2):
        writer.write(UP, (layer,), values[layer])
  reader = arrays.Reader(tmp_path / 'params')
  np.testing.assert_array_equal(reader.read(UP, (2,)), values[2])
  with pytest.raises(UserError, match=f'{UP}.*damaged'):  # and no zeros
    reader.read(UP, (1,))


def test_a_file_that_is_cut_short_after_it_was_opened(tmp_path):
  """A sentence, and not the signal that a mapping past the end of a file would bring."""
  spec = arrays.Spec((4096, 64), FLOAT32)
  write(tmp_path / 'params', {'embed/table': np.ones(spec.shape, spec.dtype)})
  reader = arrays.Reader(tmp_path / 'params')
  files = (path for path in (tmp_path / 'params').rglob('*') if path.is_file())
  os.truncate(max(files, key=lambda path: path.stat().st_size), 100_000)
  with pytest.raises(UserError, match='embed/table of .* cannot be read'):
    reader.read('embed/table')


def test_nothing_is_written_after_a_failure(tmp_path):
  spec = arrays.Spec((8, 1024, 1024), FLOAT32)
  layer = np.ones(spec.shape[1:], np.float32)
  for _ in range(3):
    with pytest.raises(KeyboardInterrupt), folders.new_folder(tmp_path / 'made') as folder:
      with arrays.Writer(folder / 'params', {UP: spec}) as writer:
        for number in range(8):
          writer.write(UP, (number,), layer)
        raise KeyboardInterrupt
    time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []
