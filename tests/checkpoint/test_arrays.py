"""Arrays on disk in pieces: what Orbax wrote is read, and what is written Orbax restores."""

import http.server
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
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
SPECS = {
  'embed/table': arrays.Spec((37, 24), FLOAT32),
  'unembed/kernel': arrays.Spec((24, 37), FLOAT32),
  'final_norm/scale': arrays.Spec((24,), FLOAT32),
  'blocks/norm/scale': arrays.Spec((3, 24), FLOAT32),
  'blocks/ffn/up': arrays.Spec((3, 5, 24, 26), BFLOAT16),
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


def test_what_is_written_is_read(small_chunks, tmp_path):
  values = draw()
  write(tmp_path / 'params', values, order=lambda jobs: reversed(jobs))
  reader = arrays.Reader(tmp_path / 'params')
  assert reader.specs == SPECS
  for path, want in values.items():
    np.testing.assert_array_equal(reader.read(path), want, strict=True)
  up = values['blocks/ffn/up']
  np.testing.assert_array_equal(reader.read('blocks/ffn/up', (1, 2)), up[1, 2])
  odd = (slice(0, 3), 4, slice(5, 23), slice(1, 2))
  np.testing.assert_array_equal(reader.read('blocks/ffn/up', odd), up[odd])
  requests = [(path, index) for path in SPECS for index in arrays.pieces(path, SPECS[path])]
  regions = arrays.read_ahead((reader, path, index) for path, index in requests)
  for (path, index), region in zip(requests, regions, strict=True):
    np.testing.assert_array_equal(region, values[path][index])


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
  return checkpoint.abstract(params, sharding.tree(params, mesh))


def save(folder, model: config.Model, shape) -> dict:
  """Random parameters as step 1 of a run on a mesh."""
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding),
    abstract(model, shape),
  )
  checkpoints = checkpoint.Checkpoints(folder, keep=1)
  checkpoints.save(1, params, {'count': np.zeros(())}, {}, None)
  checkpoints.close()
  return params


@pytest.mark.parametrize('shape', [(1, 1, 1, 1), (1, 2, 2, 2), (2, 4, 1, 1)], ids=str)
@pytest.mark.parametrize('small', [True, False])
def test_checkpoints_of_training_are_read(tmp_path, models, monkeypatch, shape, small):
  if small:  # or every array is one chunk, the whole of its shard
    monkeypatch.setattr(arrays, 'CHUNK_BYTES', 2000)
  params = save(tmp_path, models['bam_kv_experts'], shape)
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


def test_chunks_are_nothing_to_a_restore(tmp_path, models, monkeypatch):
  monkeypatch.setattr(arrays, 'CHUNK_BYTES', 2000)
  params = save(tmp_path, models['untied'], (1, 4, 1, 2))
  restored = checkpoint.restore_params(tmp_path, abstract(models['untied'], (1, 2, 4, 1)))
  jax.tree.map(np.testing.assert_array_equal, restored, params)


@settings(max_examples=100, deadline=None)
@given(
  path=st.sampled_from(sorted(SPECS)),
  shape=st.lists(st.integers(1, 9), min_size=4, max_size=4),
  dtype=st.sampled_from([FLOAT32, BFLOAT16]),
  bound=st.integers(4, 300),
)
def test_pieces_are_the_array_and_chunks_are_bounded(path, shape, dtype, bound):
  spec = arrays.Spec(tuple(shape[: len(SPECS[path].shape)]), dtype)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(arrays, 'CHUNK_BYTES', bound)
    chunk = arrays.chunk_shape(path, spec)
    indices = list(arrays.pieces(path, spec))
  count = np.zeros(spec.shape, int)
  for index in indices:
    count[index] += 1
    for (start, stop), size, step_ in zip(arrays.bounds(spec, index), spec.shape, chunk):
      assert start % step_ == 0 and (stop % step_ == 0 or stop == size)
  assert (count == 1).all()
  longest = max(spec.shape)  # one row along the longest axis may be all that can be had
  smallest = spec.nbytes // longest if not path.startswith('blocks/') else spec.dtype.itemsize
  assert np.prod(chunk) * dtype.itemsize <= max(bound, smallest)


@pytest.mark.parametrize(
  'index, change, words',
  [
    ((0, 0), lambda a: a, 'twice'),
    ((1, 1, slice(0, 5)), lambda a: a[:5], 'whole chunks'),
    ((1, 1, slice(3, 12)), lambda a: a[3:12], 'whole chunks'),
    ((1, slice(2, 2)), lambda a: a[None][:0], 'whole chunks'),
    ((1, 1), lambda a: a[None], 'not'),
    ((1, 1), lambda a: a.astype(np.float32), 'not'),
  ],
)
def test_what_a_caller_gets_wrong(small_chunks, tmp_path, index, change, words):
  values = draw()['blocks/ffn/up']
  writer = arrays.Writer(tmp_path / 'params', {'blocks/ffn/up': SPECS['blocks/ffn/up']})
  writer.write('blocks/ffn/up', (0, 0), values[0, 0])
  with pytest.raises(ValueError, match=words):
    writer.write('blocks/ffn/up', index, change(values[1, 1]))
  with pytest.raises(ValueError, match='not written whole'):
    writer.finish()


def test_what_was_never_written_is_no_zero(small_chunks, tmp_path):
  values = draw()['blocks/ffn/up']
  writer = arrays.Writer(tmp_path / 'params', {'blocks/ffn/up': SPECS['blocks/ffn/up']})
  for layer, expert in itertools.product(range(3), range(5)):
    if (layer, expert) != (1, 2):
      writer.write('blocks/ffn/up', (layer, expert), values[layer, expert])
  with pytest.raises(ValueError):
    writer.finish()
  reader = arrays.Reader(tmp_path / 'params')
  np.testing.assert_array_equal(reader.read('blocks/ffn/up', (1, 1)), values[1, 1])
  with pytest.raises(UserError, match='blocks/ffn/up.*damaged'):
    reader.read('blocks/ffn/up', (1, 2))


def test_a_damaged_item_is_refused(small_chunks, tmp_path):
  write(tmp_path / 'params', draw())
  for file in (tmp_path / 'params' / 'd').iterdir():
    file.write_bytes(file.read_bytes()[:10])
  with pytest.raises(UserError, match='damaged'):
    reader = arrays.Reader(tmp_path / 'params')
    for path in reader.specs:
      reader.read(path)
  shutil.rmtree(tmp_path / 'params')
  with pytest.raises(UserError, match='damaged'):
    arrays.Reader(tmp_path / 'params')


def test_a_file_that_is_cut_short_after_it_was_opened(tmp_path):
  """A sentence, and not the signal that a mapping past the end of a file would bring."""
  spec = arrays.Spec((4096, 64), FLOAT32)
  write(tmp_path / 'params', {'embed/table': np.ones(spec.shape, spec.dtype)})
  reader = arrays.Reader(tmp_path / 'params')
  files = (path for path in (tmp_path / 'params').rglob('*') if path.is_file())
  os.truncate(max(files, key=lambda path: path.stat().st_size), 100_000)
  with pytest.raises(UserError, match='embed/table of .* cannot be read'):
    reader.read('embed/table')


def test_a_bucket_is_read_and_written_by_the_same_code():
  local = arrays._store(epath.Path('/a/b c/params'), 'blocks/ffn/up')
  remote = arrays._store(epath.Path('gs://bucket/b c/params'), 'blocks/ffn/up')
  assert remote['kvstore'].pop('base') == {
    'driver': 'gcs',
    'bucket': 'bucket',
    'path': 'b c/params/',
  }
  assert local['kvstore'].pop('base') == {'driver': 'file', 'path': '/a/b c/params/'}
  assert local == remote
  spec = ts.Spec(arrays._store(epath.Path('gs://bucket/b c/params'), 'blocks/ffn/up'))
  assert spec.kvstore.url.startswith('gs://bucket/b%20c/params/')


class Bucket(http.server.BaseHTTPRequestHandler):
  """As much of Google Cloud Storage as reading takes: a folder's files are the objects."""

  root: Path
  protocol_version = 'HTTP/1.1'

  def do_GET(self):  # noqa: N802, the library's name
    name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path.split('/b/bucket/o/')[1])
    file, status, headers = self.root / name, 200, {'x-goog-generation': '1'}
    body = file.read_bytes() if file.is_file() else b''
    if not file.is_file():
      status = 404
    elif wanted := self.headers.get('Range'):
      start, last = (int(end) for end in wanted.removeprefix('bytes=').split('-'))
      status, headers['Content-Range'] = 206, f'bytes {start}-{last}/{len(body)}'
      body = body[start : last + 1]
    self.send_response(status)
    for key, value in headers.items():
      self.send_header(key, value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *_):
    """Says nothing."""


def test_a_bucket_is_read(tmp_path):
  values = draw()
  write(tmp_path / 'a b' / 'params', values)
  np.savez(tmp_path / 'want.npz', **{path: a.astype(FLOAT32) for path, a in values.items()})
  handler = type('Served', (Bucket,), {'root': tmp_path})
  program = f"""
import numpy as np
from bam_jax.checkpoint import arrays
reader, want = arrays.Reader('gs://bucket/a b/params'), np.load({str(tmp_path / 'want.npz')!r})
assert sorted(reader.specs) == sorted(want)
for path in want:
  np.testing.assert_array_equal(reader.read(path).astype(np.float32), want[path])
np.testing.assert_array_equal(reader.read('embed/table', (slice(3, 9),)), want['embed/table'][3:9])
try:
  arrays.Reader('gs://bucket/other/params')
except arrays.UserError as error:
  print(error)
"""
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
      'TENSORSTORE_GCS_HTTP_URL': f'http://127.0.0.1:{server.server_port}',
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'any',
    }
    done = subprocess.run(
      [sys.executable, '-c', program],
      env=os.environ | environment,
      cwd=Path(__file__).parents[2],
      capture_output=True,
      text=True,
      timeout=100,
    )
    server.shutdown()
  assert done.returncode == 0, done.stderr
  assert 'gs://bucket/other/params holds no arrays' in done.stdout


def test_nothing_is_written_after_a_failure(tmp_path):
  spec = arrays.Spec((8, 1024, 1024), FLOAT32)
  layer = np.ones(spec.shape[1:], np.float32)
  for _ in range(5):
    with pytest.raises(KeyboardInterrupt):
      with folders.new_folder(tmp_path / 'made') as folder:
        with arrays.Writer(folder / 'params', {'blocks/ffn/up': spec}) as writer:
          for number in range(8):
            writer.write('blocks/ffn/up', (number,), layer)
          raise KeyboardInterrupt
    time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(disk):
  small_disk = disk(1024)
  spec = arrays.Spec((8, 256, 128), FLOAT32)  # 1 MB, and what describes it
  values = draw({'blocks/ffn/up': spec})
  with pytest.raises(UserError, match='No space left on device'):
    with folders.new_folder(small_disk / 'made') as folder:
      write(folder / 'params', values)
  assert list(small_disk.iterdir()) == []


def test_the_network_of_every_variant_has_chunks(model):
  abstract = transformer.Network(model, config.Compute()).abstract()
  for path, leaf in traverse_util.flatten_dict(abstract, sep='/').items():
    spec = arrays.Spec(leaf.shape, FLOAT32)
    first = next(arrays.pieces(path, spec))
    experts = sharding.has_experts(path, len(leaf.shape))
    assert len(first) == (1 + experts if path.startswith('blocks/') else len(leaf.shape))
