"""What is said of checkpoints, against NumPy over whole arrays."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from bam_jax.checkpoint import arrays
from bam_jax.convert import inspect
from bam_jax.errors import UserError
from tests.hf.folders import draw, make_model, write_checkpoint


def shown(facts: dict) -> str:
  json.dumps(facts, allow_nan=False)
  console = rich.console.Console(file=io.StringIO(), width=200)
  console.print(*inspect.tables(facts))
  return console.file.getvalue()


still = lambda done, total: None  # shows no progress


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(arrays, 'CHUNK_BYTES', 2000)


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_a_description(tmp_path, dtype):
  model, seen = make_model('btx'), []
  values = {path: a.astype(dtype) for path, a in draw(model).items()}
  path = write_checkpoint(tmp_path / 'one', model, values)
  facts = inspect.describe(path, lambda *both: seen.append(both))
  total = sum(array.nbytes for array in values.values())
  assert seen[-1] == (total, total)
  assert facts['checkpoint'] == str(path)
  assert facts['meta']['model']['ffn_experts']['num_experts'] == 4
  assert [row['path'] for row in facts['arrays']] == sorted(values)
  for row in facts['arrays']:
    array = values[row['path']].astype(np.float64)
    assert row['shape'] == list(array.shape) and row['dtype'] == np.dtype(dtype).name
    assert row['bytes'] == values[row['path']].nbytes
    assert row['mean'] == pytest.approx(array.mean(), rel=1e-12, abs=1e-15)
    assert row['std'] == pytest.approx(array.std(), rel=1e-12)
    assert (row['min'], row['max'], row['not_finite']) == (array.min(), array.max(), 0)
  by_group = {row['group']: row['parameters'] for row in facts['groups']}
  assert sum(by_group.values()) == sum(array.size for array in values.values())
  assert by_group['routers'] == values['blocks/ffn/router'].size
  assert by_group['embeddings'] == values['embed/table'].size
  assert 'btx' in shown(facts) or 'blocks/ffn/router' in shown(facts)


def test_what_is_not_finite_is_counted(tmp_path):
  values = draw(make_model())
  up = values['blocks/ffn/up']
  up[1, 3, 4], up[0, 2, :2], values['final_norm/scale'][:] = np.nan, np.inf, np.nan
  facts = inspect.describe(write_checkpoint(tmp_path / 'one', make_model(), values), still)
  rows = {row['path']: row for row in facts['arrays']}
  assert rows['blocks/ffn/up']['not_finite'] == 3
  mean = up[np.isfinite(up)].mean(dtype=np.float64)
  assert rows['blocks/ffn/up']['mean'] == pytest.approx(mean, rel=1e-12)
  norm = rows['final_norm/scale']
  assert (norm['mean'], norm['std'], norm['min'], norm['not_finite']) == (None, None, None, 24)
  assert shown(facts)


def test_a_comparison(tmp_path):
  model = make_model('untied')
  ours, theirs = draw(model, 0), draw(model, 1)
  theirs['blocks/norm/scale'] = ours['blocks/norm/scale'].copy()
  theirs['final_norm/scale'] = -3 * ours['final_norm/scale']
  paths = [
    write_checkpoint(tmp_path / name, model, values)
    for name, values in (('a', ours), ('b', theirs))
  ]
  facts = inspect.compare(*paths, still)
  assert [facts['a'], facts['b']] == list(map(str, paths))
  rows = {row['path']: row for row in facts['arrays']}
  assert list(rows) == sorted(ours)

  def check(row, names):
    a, b = (
      np.concatenate([values[name].astype(np.float64).ravel() for name in names])
      for values in (ours, theirs)
    )
    distance = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert row['distance'] == pytest.approx(distance, rel=1e-12)
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    assert row['cosine'] == pytest.approx(cosine, rel=1e-12)
    assert row['equal'] == (names == ['blocks/norm/scale'])

  for path, row in rows.items():
    check(row, [path])
  assert rows['final_norm/scale']['distance'] == pytest.approx(4)
  assert rows['final_norm/scale']['cosine'] == pytest.approx(-1)
  groups = {row['group']: row for row in facts['groups']}
  assert list(groups) == ['embeddings', 'norms', 'attention', 'ffn', 'all']
  for group, row in groups.items():
    members = [path for path in ours if group in (inspect.group_of(path), 'all')]
    assert row['arrays'] == len(members)
    check(row, members)
  assert '-1' in shown(facts)


def test_checkpoints_of_different_models_are_compared_as_far_as_they_go(tmp_path):
  dense = write_checkpoint(tmp_path / 'dense', make_model(), draw(make_model()))
  halves = {path: a.astype(jnp.bfloat16) for path, a in draw(make_model('btx')).items()}
  mixed = write_checkpoint(tmp_path / 'mixed', make_model('btx'), halves)
  facts = inspect.compare(dense, mixed, still)
  rows = {row['path']: row for row in facts['arrays']}
  assert rows['blocks/ffn/up']['a_shape'] == [3, 24, 20]
  assert rows['blocks/ffn/up']['b_shape'] == [3, 4, 24, 20]
  assert rows['blocks/ffn/up']['distance'] is None and not rows['blocks/ffn/up']['equal']
  assert rows['blocks/ffn/router']['a_shape'] is None
  assert rows['embed/table']['b_dtype'] == 'bfloat16' and rows['embed/table']['distance'] > 0
  assert shown(facts)
  narrow = make_model(d_model=16, vocab_size=30, num_layers=1)
  other = write_checkpoint(tmp_path / 'narrow', narrow, draw(narrow))
  with pytest.raises(UserError, match='nothing can be compared'):
    inspect.compare(dense, other, still)
