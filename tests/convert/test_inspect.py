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


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(arrays, 'CHUNK_BYTES', 2000)


def test_a_description(tmp_path):
  model = make_model('btx')
  values = {path: a.astype(jnp.bfloat16) for path, a in draw(model).items()}
  path = write_checkpoint(tmp_path / 'one', model, values)
  facts = inspect.describe(path)
  assert facts['checkpoint'] == str(path)
  assert facts['meta']['model']['ffn_experts']['num_experts'] == 4
  assert [row['path'] for row in facts['arrays']] == sorted(values)
  for row in facts['arrays']:
    array = values[row['path']]
    assert row['shape'] == list(array.shape) and row['dtype'] == 'bfloat16'
    assert row['bytes'] == array.nbytes
  by_group = {row['group']: row['parameters'] for row in facts['groups']}
  assert sum(by_group.values()) == sum(array.size for array in values.values())
  assert by_group['routers'] == values['blocks/ffn/router'].size
  assert by_group['embeddings'] == values['embed/table'].size
  assert 'btx' in shown(facts) or 'blocks/ffn/router' in shown(facts)


def test_a_comparison(tmp_path):
  model = make_model('untied')
  ours, theirs = draw(model, 0), draw(model, 1)
  theirs['blocks/norm/scale'] = ours['blocks/norm/scale'].copy()
  theirs['final_norm/scale'] = -3 * ours['final_norm/scale']
  paths = [
    write_checkpoint(tmp_path / name, model, values)
    for name, values in (('a', ours), ('b', theirs))
  ]
  seen = []
  facts = inspect.compare(*paths, lambda *both: seen.append(both))
  total = 2 * sum(array.nbytes for array in ours.values())
  assert seen[-1] == (total, total)
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
  facts = inspect.compare(dense, mixed, lambda *_: None)
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
    inspect.compare(dense, other, lambda *_: None)
