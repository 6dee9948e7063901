"""What is said of checkpoints, against NumPy over whole arrays."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays, manifest
from bam_jax.convert import inspection
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.model import transformer


def still(done: int, total: int) -> None:
  """Shows no progress."""


def meta(model: config.Model, **changes) -> checkpoint.Meta:
  facts = dict(
    format=checkpoint.FORMAT,
    model=model,
    sequence_length=16,
    tokenizer_hash='abc',
    tokenizer_path='/tokens',
    run='bam',
    step=4,
    method=None,
    sources=(),
    versions={'jax': jax.__version__},
    bos_token='<s>',
    eos_token='</s>',
  )
  return checkpoint.Meta(**(facts | changes))


def write(folder, model: config.Model, values: dict[str, np.ndarray], **changes):
  specs = {path: arrays.Spec(array.shape, array.dtype) for path, array in values.items()}
  with folders.new_folder(folder) as beside:
    writer = arrays.Writer(beside / 'params', specs)
    for path, spec in specs.items():
      for index in arrays.pieces(path, spec):
        writer.write(path, index, values[path][index])
    writer.finish()
    checkpoint.write_meta(beside, meta(model, **changes))
  return str(folder)


def draw(model: config.Model, seed: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  abstract = transformer.Network(model, config.Compute()).abstract()
  return {
    path: (1 + 2 * rng.normal(size=leaf.shape)).astype(np.float32)
    for path, leaf in traverse_util.flatten_dict(abstract, sep='/').items()
  }


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(arrays, 'CHUNK_BYTES', 2000)


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_a_description(tmp_path, models, dtype):
  values = {path: a.astype(dtype) for path, a in draw(models['btx'], 0).items()}
  path = write(tmp_path / 'one', models['btx'], values)
  seen = []
  facts = inspection.describe(path, lambda *both: seen.append(both))
  total = sum(array.nbytes for array in values.values())
  assert seen[-1] == (total, total)
  assert facts['checkpoint'] == path and facts['meta']['model']['ffn_experts']['num_experts'] == 4
  assert [row['path'] for row in facts['arrays']] == sorted(values)
  for row in facts['arrays']:
    want = values[row['path']].astype(np.float64)
    assert row['shape'] == list(want.shape) and row['dtype'] == np.dtype(dtype).name
    assert row['bytes'] == values[row['path']].nbytes
    assert row['mean'] == pytest.approx(want.mean(), rel=1e-12)
    assert row['std'] == pytest.approx(want.std(), rel=1e-12)
    assert (row['min'], row['max'], row['not_finite']) == (want.min(), want.max(), 0)
  by_group = {row['group']: row['parameters'] for row in facts['groups']}
  assert sum(by_group.values()) == sum(array.size for array in values.values())
  assert by_group['routers'] == values['blocks/ffn/router'].size
  assert by_group['embeddings'] == values['embed/table'].size


def test_what_is_not_finite_is_counted(tmp_path, models):
  values = draw(models['dense'], 0)
  values['blocks/ffn/up'][1, 3, 4] = np.nan
  values['blocks/ffn/up'][0, 2, :2] = np.inf
  values['final_norm/scale'][:] = np.nan
  facts = inspection.describe(write(tmp_path / 'one', models['dense'], values), still)
  rows = {row['path']: row for row in facts['arrays']}
  up = values['blocks/ffn/up']
  assert rows['blocks/ffn/up']['not_finite'] == 3
  assert rows['blocks/ffn/up']['mean'] == pytest.approx(
    up[np.isfinite(up)].mean(dtype=np.float64), rel=1e-12
  )
  assert (
    rows['final_norm/scale'] | {'mean': None, 'std': None, 'not_finite': 32}
    == (rows['final_norm/scale'])
  )
  assert inspection.tables(facts)


def test_a_comparison(tmp_path, models):
  ours, theirs = draw(models['untied'], 0), draw(models['untied'], 1)
  theirs['blocks/norm/scale'] = ours['blocks/norm/scale'].copy()
  theirs['final_norm/scale'] = -3 * ours['final_norm/scale']
  paths = [
    write(tmp_path / name, models['untied'], values)
    for name, values in (('a', ours), ('b', theirs))
  ]
  facts = inspection.compare(*paths, still)
  assert [facts['a'], facts['b']] == paths
  rows = {row['path']: row for row in facts['arrays']}
  assert list(rows) == sorted(ours)
  for path, row in rows.items():
    a, b = (values[path].astype(np.float64).ravel() for values in (ours, theirs))
    assert row['distance'] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    assert row['cosine'] == pytest.approx(cosine, rel=1e-12)
    assert row['equal'] == (path == 'blocks/norm/scale')
  assert rows['final_norm/scale']['distance'] == pytest.approx(4)
  assert rows['final_norm/scale']['cosine'] == pytest.approx(-1)
  groups = {row['group']: row for row in facts['groups']}
  assert list(groups) == ['embeddings', 'norms', 'attention', 'ffn', 'all']
  whole = lambda paths: [
    np.concatenate([values[path].astype(np.float64).ravel() for path in paths])
    for values in (ours, theirs)
  ]
  for group, row in groups.items():
    chosen = [path for path in ours if group in (inspection.group_of(path), 'all')]
    a, b = whole(chosen)
    assert row['arrays'] == len(chosen)
    assert row['distance'] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)
  assert inspection.tables(facts)


def test_checkpoints_of_different_models_are_compared_as_far_as_they_go(tmp_path, models):
  dense = write(tmp_path / 'dense', models['dense'], draw(models['dense'], 0))
  halves = {path: a.astype(jnp.bfloat16) for path, a in draw(models['btx'], 0).items()}
  mixed = write(tmp_path / 'mixed', models['btx'], halves)
  rows = {row['path']: row for row in inspection.compare(dense, mixed, still)['arrays']}
  assert rows['blocks/ffn/up']['a_shape'] == [2, 32, 48]
  assert rows['blocks/ffn/up']['b_shape'] == [2, 4, 32, 48]
  assert rows['blocks/ffn/up']['distance'] is None and not rows['blocks/ffn/up']['equal']
  assert rows['blocks/ffn/router']['a_shape'] is None
  assert rows['embed/table']['b_dtype'] == 'bfloat16'
  assert rows['embed/table']['distance'] > 0


def test_nothing_in_common(tmp_path, models):
  narrow = dataclasses.replace(models['dense'], d_model=16, vocab_size=30, num_layers=1)
  paths = [
    write(tmp_path / f'{model.d_model}', model, draw(model, 0))
    for model in (models['dense'], narrow)
  ]
  with pytest.raises(UserError, match='nothing can be compared'):
    inspection.compare(*paths, still)


def test_arrays_of_zeros_have_no_angle(tmp_path, models):
  values = draw(models['dense'], 0)
  zeros = {path: np.zeros_like(array) for path, array in values.items()}
  paths = [
    write(tmp_path / name, models['dense'], given)
    for name, given in (('zeros', zeros), ('values', values))
  ]
  for row in inspection.compare(*paths, still)['arrays']:
    assert row['distance'] is None and row['cosine'] is None and not row['equal']
  facts = inspection.compare(paths[0], paths[0], still)
  assert all(row['equal'] for row in facts['arrays']) and inspection.tables(facts)
  assert not any(math.isnan(row['distance'] or 0) for row in facts['arrays'])


def test_a_manifest_is_shown(tmp_path, models):
  made = manifest.Manifest(
    command='python -m bam_jax.convert upcycle ...',
    time='2026-01-01T00:00:00+00:00',
    sources=(manifest.Source('/runs/seed', 'seed', 3, 'ab' * 32), manifest.Source('/hf/model')),
    made=(manifest.Made('embed/table', 'mean', 'embed/table'),),
    upcycle=config.Upcycle(('/runs/seed', '/hf/model'), 'btx'),
  )
  values = draw(models['btx'], 0)
  path = write(tmp_path / 'one', models['btx'], values, manifest=made)
  assert checkpoint.read_meta(path).manifest == made
  tables = inspection.tables(inspection.describe(path, still))
  shown = '\n'.join(
    str(cell) for table in tables for column in table.columns for cell in column.cells
  )
  for word in ('upcycle ...', '/runs/seed', '/hf/model', 'abababab', 'method=btx', 'mean'):
    assert word in shown
