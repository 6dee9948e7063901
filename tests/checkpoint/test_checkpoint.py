"""Checkpoints come back on any mesh, in part, and as what they are; anything else is refused."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays, integrity
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.parallel import sharding
from bam_jax.train import step

OPTIMIZER = config.Optimizer()


def meta(model: config.Model, at: int, **changes) -> checkpoint.Meta:
  facts = dict(
    format=checkpoint.FORMAT, model=model, sequence_length=16, tokenizer_hash='abc',
    tokenizer_path='/tokens', run='bam', step=at, method='bam_kv_experts',
    sources=('seed', 'code', 'seed'), versions={'jax': jax.__version__}, bos_token='<s>',
    eos_token='</s>',
  )  # fmt: skip
  return checkpoint.Meta(**(facts | changes))


def abstract(model: config.Model, shape=(1, 1, 1, 1)) -> step.State:
  mesh = sharding.make_mesh(config.Mesh(*shape))
  return step.abstract_state(model, config.Compute(), OPTIMIZER, mesh)


def draw(model: config.Model, shape, seed: int) -> step.State:
  """Random values in every array, the optimizer's too."""
  rng = np.random.default_rng(seed)

  def one(leaf):
    value = rng.normal(size=leaf.shape) if leaf.dtype == np.float32 else rng.integers(1, 9)
    return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)

  return jax.tree.map(one, abstract(model, shape))


def check_same(got, want) -> None:
  """The same values to the last bit, whatever the layout."""
  got_leaves, got_tree = jax.tree.flatten(got)
  want_leaves, want_tree = jax.tree.flatten(want)
  assert got_tree == want_tree
  for ours, theirs in zip(got_leaves, want_leaves):
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.fixture(scope='module')
def written(tmp_path_factory, models):
  """A run's folder with steps 3 and 12 of a mixture, written from eight devices, and the states."""
  folder = tmp_path_factory.mktemp('bam')
  model, states = models['bam_kv_experts'], {}
  checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', keep=2)
  for at in (3, 12):
    states[at] = draw(model, (1, 2, 2, 2), at)
    checkpoints.save(
      at, *states[at][:2], {'iterator': {'next': at}, 'seconds': 1.5}, meta(model, at)
    )
  checkpoints.close()
  return folder, states


@pytest.mark.parametrize(
  'shape',
  [(1, 1, 1, 1), (1, 1, 4, 2), pytest.param((2, 4, 1, 1), marks=pytest.mark.slow)],
  ids=str,
)
def test_restore_on_another_mesh(written, models, shape):
  folder, states = written
  checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', keep=2)
  assert checkpoints.latest() == 12
  wanted = abstract(models['bam_kv_experts'], shape)
  params, opt_state, data = checkpoints.restore(12, wanted.params, wanted.opt_state)
  checkpoints.close()
  restored = step.State(params, opt_state)
  check_same(restored, states[12])
  for leaf, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
    assert leaf.sharding == want.sharding
  assert data == {'iterator': {'next': 12}, 'seconds': 1.5}


def test_parameters_alone(written, models, tmp_path):
  """A checkpoint to hand around need not hold the optimizer: twice the parameters' size."""
  folder, states = written
  (tmp_path / '3').mkdir()
  for item in ('params', 'meta'):
    (tmp_path / '3' / item).symlink_to(folder / 'checkpoints' / '3' / item)
  wanted = abstract(models['bam_kv_experts'], (1, 1, 4, 1)).params
  for path in (tmp_path, folder / 'checkpoints' / '3'):
    params = checkpoint.restore_params(path, wanted)
    check_same(params, states[3].params)
    for leaf, want in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
      assert leaf.sharding == want.sharding
  assert checkpoint.read_meta(tmp_path) == meta(models['bam_kv_experts'], 3)


def test_another_model_is_not_restored(written, models):
  wider = dataclasses.replace(models['bam_kv_experts'], ffn_dim=64)
  for other in (wider, models['untied']):
    with pytest.raises(UserError, match='a checkpoint of another model'):
      checkpoint.restore_params(written[0], abstract(other).params)
  with pytest.raises(UserError, match='a checkpoint of another model'):
    checkpoint.open_params(written[0], wider)


def spoil(step: Path, what: str) -> str:
  """Does what disks do to one file of a checkpoint; its path."""
  item, how = what.split(' ')
  # The largest file has the values, and nothing in its format vouches for them.
  files = [path for path in (step / item).rglob('*') if path.is_file()]
  path = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(path.read_bytes())
  if how == 'flipped':
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
  elif how == 'cut':
    path.write_bytes(content[:-1])
  else:
    path.unlink()
  return str(path.relative_to(step))


DAMAGE = ['params flipped', 'meta gone', 'checksums flipped'] + [
  pytest.param(what, marks=pytest.mark.slow)
  for what in ('params cut', 'params gone', 'opt_state flipped', 'data flipped', 'meta flipped')
]


@pytest.fixture
def two_steps(written, tmp_path):
  """A copy of a run's checkpoints, 3 and 12."""
  return shutil.copytree(written[0] / 'checkpoints', tmp_path / 'checkpoints')


@pytest.mark.parametrize('what', DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(two_steps, written, models, what):
  assert integrity.set_aside(two_steps) == [] == integrity.set_aside(two_steps / 'nowhere')
  file = spoil(two_steps / '12', what)
  (sentence,) = integrity.set_aside(two_steps)
  assert f'{two_steps}/12 is damaged' in sentence
  assert file in sentence or what.startswith('checksums'), 'which may be of any file'
  assert 'renamed to 12.damaged' in sentence
  assert checkpoint.finished_step(two_steps) == 3
  # The step can be saved again, and what is set aside takes no good one's place.
  model = models['bam_kv_experts']
  checkpoints = checkpoint.Checkpoints(two_steps, keep=2)
  assert checkpoints.latest() == 3
  wanted = abstract(model)
  params, opt_state, data = checkpoints.restore(3, wanted.params, wanted.opt_state)
  check_same(step.State(params, opt_state), written[1][3])
  assert data['iterator'] == {'next': 3}
  checkpoints.save(12, params, opt_state, data, meta(model, 12))
  checkpoints.close()
  assert integrity.set_aside(two_steps) == []
  assert {path.name for path in two_steps.iterdir()} == {'3', '12', '12.damaged'}


def test_a_damaged_checkpoint_gives_no_parameters(two_steps, models):
  file = spoil(two_steps / '12', 'params flipped')
  wanted = abstract(models['bam_kv_experts']).params
  for read in (
    lambda: checkpoint.restore_params(two_steps, wanted),
    lambda: arrays.Reader(two_steps / '12' / 'params'),
  ):
    with pytest.raises(UserError, match=f'12 is damaged .*{file} does not match its checksum'):
      read()
  spoil(two_steps / '3', 'opt_state flipped')
  checkpoint.restore_params(two_steps / '3', wanted)  # which does not read it
  with pytest.raises(UserError, match=f'{two_steps}/12 is damaged .* no intact one'):
    integrity.set_aside(two_steps)
  assert {path.name for path in two_steps.iterdir()} == {'3', '12'}, 'none is touched'


def test_a_checkpoint_that_was_copied_from_a_bucket_is_believed(two_steps, written, models):
  shutil.rmtree(two_steps / '12' / 'checksums')
  assert integrity.set_aside(two_steps) == []
  wanted = abstract(models['bam_kv_experts']).params
  check_same(checkpoint.restore_params(two_steps, wanted), written[1][12].params)


def test_a_checkpoint_is_on_disk_before_the_one_before_is_removed(tmp_path, models, monkeypatch):
  synced, before, state = set(), [], draw(models['dense'], (1, 1, 1, 1), 0)
  written = integrity.write  # the last to write into a checkpoint

  def write(folder, into):
    written(folder, into)
    assert {path.stat().st_ino for path in Path(folder).rglob('*')} <= synced
    before.append((tmp_path / '9').exists())

  monkeypatch.setattr(os, 'fsync', lambda file: synced.add(os.fstat(file).st_ino))
  monkeypatch.setattr(integrity, 'write', write)
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
  for at in (9, 10):  # by number, not by name
    checkpoints.save(at, *state[:2], {}, meta(models['dense'], at))
  checkpoints.close()
  assert before == [False, True] and not (tmp_path / '9').exists()
  # Empty, and read in buckets only.
  later = {path for path in (tmp_path / '10').rglob('*') if path.stat().st_ino not in synced}
  assert {path.name for path in later} <= {folders.COMMITTED}


@pytest.fixture
def fake(tmp_path, models):
  """The function that writes the text of a `meta` by hand and gives the checkpoint's folder."""

  def write(text: str | None = None, **changes):
    facts = dataclasses.asdict(meta(models['dense'], 5)) | changes
    (tmp_path / '5' / 'meta').mkdir(parents=True)
    path = tmp_path / '5' / 'meta' / 'metadata'
    path.write_text(json.dumps(facts) if text is None else text)
    return tmp_path / '5'

  return write


@pytest.mark.parametrize(
  'text, changes, words',
  [
    (None, {'format': 3}, ['format 3', 'reads 2: upgrade bam_jax']),
    (None, {'format': 1, 'router_bias': 0}, ['format 1', 'reads 2: read it with commit d21418b']),
    (None, {'format': None}, ['not a checkpoint of format 2']),
    ('', {}, ['meta', 'damaged']),
    (None, {'zzz': 1}, ['meta', 'zzz']),
  ],
  ids=str,
)
def test_a_meta_that_is_not_ours_is_refused(fake, text, changes, words):
  folder = fake(text, **changes)
  with pytest.raises(UserError) as caught:
    checkpoint.read_meta(folder)
  for word in [str(folder), *words]:
    assert word in str(caught.value)


@pytest.mark.parametrize('place', ['run/checkpoints/5', 'run', 'data'])
def test_a_tokenizer_is_found_where_it_may_be(tmp_path, models, place):
  right = hashlib.sha256(b'right').hexdigest()
  facts = meta(models['dense'], 5, tokenizer_hash=right, tokenizer_path=str(tmp_path / 'data'))
  for folder in ('run/checkpoints/5', 'data'):
    (tmp_path / folder).mkdir(parents=True)
  checkpoint.write_meta(tmp_path / 'run' / 'checkpoints' / '5', facts)
  (tmp_path / 'run' / 'tokenizer.json').write_bytes(b'wrong')
  with pytest.raises(UserError, match=f'{right[:12]}.*copy the file there'):
    checkpoint.find_tokenizer(tmp_path / 'run')
  (tmp_path / place / 'tokenizer.model').write_bytes(b'right')
  assert checkpoint.find_tokenizer(tmp_path / 'run') == tmp_path / place / 'tokenizer.model'


def test_the_newest_and_every_third_are_kept(tmp_path, models):
  state = draw(models['dense'], (1, 1, 1, 1), 0)
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, keep_every=3)
  for at in (2, 3, 4, 6, 7):
    checkpoints.save(at, *state[:2], {}, meta(models['dense'], at))
  checkpoints.close()
  assert {path.name for path in tmp_path.iterdir()} == {'3', '6', '7'}
