"""A checkpoint gets the bits that a mesh gets; what does not fit is refused in a sentence."""

import dataclasses
import hashlib
import shutil
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays
from bam_jax.config import strict
from bam_jax.errors import UserError
from bam_jax.parallel import sharding
from bam_jax.recipes import graph, start
from bam_jax.upcycle import merge, outputs, rules
from tests.upcycle.memory import NAMES, TOKENIZER, abstract, draw, flat, save, spelled_out

METHODS = typing.get_args(config.Method)
KEY = merge.run_key(3, 'bam')


@pytest.fixture(scope='module')
def sources(tmp_path_factory, models):
  """Folders of three dense runs, saved from a mesh of eight devices, and their parameters."""
  folder, model = tmp_path_factory.mktemp('runs'), models['untied']
  mesh = sharding.make_mesh(config.Mesh(1, 2, 2, 2))
  made = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(arrays, 'CHUNK_BYTES', 3000)
    for number, name in enumerate(NAMES):
      made.append(draw(model, number))
      save(folder / name, jax.device_put(made[-1], sharding.tree(abstract(model), mesh)), model)
  return folder, made


@pytest.fixture
def small_chunks(monkeypatch):
  monkeypatch.setattr(arrays, 'CHUNK_BYTES', 2000)
  monkeypatch.setattr(arrays, 'READ_BYTES', 4000)
  monkeypatch.setattr(arrays, 'PENDING_BYTES', 4000)


def how(folder, method: str, **changes) -> config.Upcycle:
  names = NAMES[:1] if method == 'sparse' else NAMES
  changes = ({'num_experts': 5} if method == 'sparse' else {}) | changes
  return config.Upcycle(tuple(str(folder / name) for name in names), method, **changes)


def convert(output, upcycle: config.Upcycle, **changes) -> checkpoint.Meta:
  facts = dict(seed=3, name='bam', dtype='float32', command='convert', progress=lambda *_: None)
  return outputs.to_checkpoint(output, upcycle, **(facts | changes))


def values(folder) -> dict[str, np.ndarray]:
  reader = arrays.Reader(folder / 'params')
  return {path: reader.read(path) for path in reader.specs}


OPTIONS = {
  'copies': {},
  'weighted': dict(average='weighted', weights=(1.0, 2.0, 5.0)),
  'everything': dict(
    drop_ratio=0.5, noise=0.05, average='first', expert_bias=True, router_scale=2.0, top_k=2,
    renormalize=True, capacity_factor=1.5,
  ),
  'zero': dict(router_init='zero', drop_ratio=0.3),
}  # fmt: skip


FAST = [
  ('bam_kv_experts', 'everything'), ('bam_shared_kv', 'copies'), ('btx', 'zero'),
  ('sparse', 'everything'), ('average', 'weighted'),
]  # fmt: skip
REST = [(method, name) for method in METHODS[:4] for name in OPTIONS if (method, name) not in FAST]


@pytest.mark.parametrize(
  'method, name', [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_the_numbers_that_are_spelled_out(small_chunks, tmp_path, models, sources, method, name):
  folder, params = sources
  changes = OPTIONS[name] | ({} if method == 'average' else {'num_experts': 5})
  if method == 'sparse' and name == 'weighted':
    changes |= dict(weights=(2.0,))
  upcycle = how(folder, method, **changes)
  meta = convert(tmp_path / 'mix', upcycle)
  assert meta.model == rules.mixture_model(models['untied'], upcycle)
  assert checkpoint.read_meta(tmp_path / 'mix') == meta
  got = values(tmp_path / 'mix')
  want = spelled_out(params[: len(upcycle.sources)], models['untied'], upcycle, KEY)
  assert got.keys() == want.keys()
  for path, array in want.items():
    np.testing.assert_array_equal(got[path], array, err_msg=path, strict=True)


def test_with_a_recipes_seed_and_name_it_is_the_recipes_mixture(
  tmp_path, models, recipe_dict, dataset
):
  parsed = config.parse(recipe_dict | {'seed': 11})
  for number, name in enumerate(NAMES):
    save(tmp_path / name, draw(models['dense'], number), models['dense'])
  nodes = graph.resolve(parsed)

  def make(recipe, nodes, mesh=None):
    where = sharding.tree(abstract(nodes['bam'].model), sharding.make_mesh(mesh or config.Mesh()))
    return start.initial_params(recipe, nodes, nodes['bam'], tmp_path, dataset, where)

  want = make(parsed, nodes)
  jax.tree.map(np.testing.assert_array_equal, make(parsed, nodes, config.Mesh(2, 2, 1, 2)), want)
  convert(tmp_path / 'mix', how(tmp_path, 'bam_kv_experts'), seed=11, name='bam')
  got = checkpoint.restore_host_params(tmp_path / 'mix', abstract(nodes['bam'].model))
  jax.tree.map(np.testing.assert_array_equal, got, want)

  # And a recipe starts from the converted one.
  recipe_dict['runs']['bam']['init'] = {'checkpoint': str(tmp_path / 'mix')}
  parsed = config.parse(recipe_dict)
  jax.tree.map(np.testing.assert_array_equal, make(parsed, graph.resolve(parsed)), want)


def test_a_recipe_refuses_what_convert_refuses(tmp_path, models, recipe_dict, dataset):
  parsed = config.parse(recipe_dict)
  nodes = graph.resolve(parsed)
  where = sharding.tree(abstract(nodes['btx'].model), sharding.make_mesh(config.Mesh()))
  make = lambda: start.initial_params(parsed, nodes, nodes['btx'], tmp_path, dataset, where)
  for number, name in enumerate(NAMES):
    save(tmp_path / name, draw(models['dense'], min(number, 1)), models['dense'])
  with pytest.raises(UserError, match='law/checkpoints/7 holds the same values as .*code'):
    make()
  shutil.rmtree(tmp_path / 'law')
  spoilt = draw(models['dense'], 2)
  spoilt['blocks']['ffn']['gate'][1, 2, 3] = np.nan
  save(tmp_path / 'law', spoilt, models['dense'])
  with pytest.raises(UserError, match=r'law/checkpoints/7 has nan at blocks/ffn/gate\[1, 2, 3\]'):
    make()


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(chunk=st.integers(1000, 20_000), ahead=st.integers(1, 20_000), pending=st.integers(0, 9000))
def test_no_size_of_pieces_changes_a_bit(tmp_path_factory, models, sources, chunk, ahead, pending):
  folder, params = sources
  output = tmp_path_factory.mktemp('made') / 'mix'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(arrays, 'CHUNK_BYTES', chunk)
    patch.setattr(arrays, 'READ_BYTES', ahead)
    patch.setattr(arrays, 'PENDING_BYTES', pending)
    meta = convert(output, how(folder, 'btx', noise=0.1, num_experts=4))
  got = values(output)
  for path, array in spelled_out(params, models['untied'], meta.manifest.upcycle, KEY).items():
    np.testing.assert_array_equal(got[path], array, err_msg=path)
  for source, mine in zip(meta.manifest.sources, params):
    assert source.array_hashes == {p: direct_hash(array) for p, array in flat(mine).items()}


def direct_hash(array: np.ndarray) -> str:
  """As the documentation has it."""
  sha256 = hashlib.sha256
  return sha256(b''.join(sha256(part.tobytes()).digest() for part in array)).hexdigest()


@pytest.mark.parametrize('method', ['bam_shared_kv', 'average'])
def test_bfloat16(tmp_path, sources, method):
  folder, _ = sources
  for dtype in ('float32', 'bfloat16'):
    meta = convert(tmp_path / dtype, how(folder, method), dtype=dtype)
  full, half = (values(tmp_path / dtype) for dtype in ('float32', 'bfloat16'))
  for path, array in half.items():
    assert array.dtype == jnp.bfloat16
    np.testing.assert_array_equal(array, full[path].astype(jnp.bfloat16))
  # Whoever restores it asks for float32, on a mesh or not.
  mesh = sharding.make_mesh(config.Mesh(1, 2, 1, 2))
  wanted = checkpoint.abstract(abstract(meta.model), sharding.tree(abstract(meta.model), mesh))
  placed = checkpoint.restore_params(tmp_path / 'bfloat16', wanted)
  on_host = checkpoint.restore_host_params(tmp_path / 'bfloat16', abstract(meta.model))
  for path, array in flat(placed).items():
    assert array.dtype == np.float32 and flat(on_host)[path].dtype == np.float32
    np.testing.assert_array_equal(array, half[path].astype(np.float32))
    np.testing.assert_array_equal(flat(on_host)[path], array)


def test_converted_checkpoints_are_sources(tmp_path, sources):
  folder, params = sources
  convert(tmp_path / 'soup', how(folder, 'average'), seed=0, name='', dtype='bfloat16')
  upcycle = config.Upcycle((str(tmp_path / 'soup'), str(folder / 'law')), 'btx')
  meta = convert(tmp_path / 'mix', upcycle)
  # bfloat16 is widened before anything is computed.
  average = values(tmp_path / 'soup')['embed/table'].astype(np.float32)
  want = (average + flat(params[2])['embed/table']) / 2
  np.testing.assert_array_equal(values(tmp_path / 'mix')['embed/table'], want, strict=True)
  assert meta.sources == ('soup', 'law')


def test_what_the_checkpoint_says_of_itself(tmp_path, models, sources):
  folder, params = sources
  upcycle, seen = how(folder, 'bam_shared_kv', num_experts=4, noise=0.5), []
  convert(
    tmp_path / 'mix', upcycle, command='the command', progress=lambda *both: seen.append(both)
  )
  names = sorted(one.name for one in (tmp_path / 'mix').iterdir())
  assert names == ['checksums', 'meta', 'params', 'tokenizer.json']
  (tmp_path / 'mix').rename(tmp_path / 'moved')
  assert checkpoint.find_tokenizer(tmp_path / 'moved').read_bytes() == TOKENIZER
  meta, made = checkpoint.read_meta(tmp_path / 'moved'), values(tmp_path / 'moved')
  assert (meta.run, meta.step, meta.method) == ('bam', 0, 'bam_shared_kv')
  assert meta.sources == ('seed', 'code', 'law', 'seed')
  record = meta.manifest
  assert record.upcycle == upcycle and (record.seed, record.name) == (3, 'bam')
  assert record.command == 'the command' and record.time.endswith('+00:00')
  assert sorted(row.target for row in record.made) == sorted(made)
  hows = {row.target: (row.how, row.source) for row in record.made}
  assert hows['blocks/attention/key'] == ('mean', 'blocks/attention/key')
  assert hows['blocks/ffn/up'] == ('stack', 'blocks/ffn/up')
  assert hows['blocks/ffn/router'] == ('router', None)
  for name, source, mine in zip(NAMES, record.sources, params, strict=True):
    assert source.path == str(folder / name / 'checkpoints' / '7')
    assert (source.run, source.step) == (name, 7)
    hashes = {path: direct_hash(array) for path, array in flat(mine).items()}
    assert source.array_hashes == hashes
    lines = ''.join(f'{path} {hashes[path]}\n' for path in sorted(hashes))
    assert source.hash == hashlib.sha256(lines.encode()).hexdigest()
  assert strict.from_dict(checkpoint.Meta, strict.to_dict(meta), 'meta') == meta
  # Progress grows to the bytes that are read and written.
  assert [done for done, _ in seen] == sorted({done for done, _ in seen})
  read = sum(array.nbytes for mine in params for array in flat(mine).values())
  total = read + sum(array.nbytes for array in made.values())
  assert seen[-1] == (total, total)
  # Without a name, neither the folder's name nor anything but the seed decides what is drawn.
  drawn = []
  for output, seed in (('one', 3), ('two', 3), ('three', 4)):
    convert(tmp_path / output, how(folder, 'btx'), name='', seed=seed)
    drawn.append(values(tmp_path / output)['blocks/ffn/router'])
  assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).all()


# What is refused. Each function spoils something below `tmp_path` and names the sources.


def respelled(tmp_path, folder, models):
  return [folder / 'seed', folder / 'code', folder / 'seed' / 'checkpoints' / '7']


def equal_otherwise_stored(tmp_path, folder, models):
  save(tmp_path / 'again', draw(models['untied'], 1), models['untied'], step=8)
  return [folder / 'seed', folder / 'code', tmp_path / 'again']


def with_array(path, change):
  """The case of a source in which one array is changed, or deleted."""

  def spoil(tmp_path, folder, models):
    params = draw(models['untied'], 5)
    *groups, name = path.split('/')
    group = params
    for key in groups:
      group = group[key]
    group[name] = change(group.get(name))
    if group[name] is None:
      del group[name]
    save(tmp_path / 'odd', params, models['untied'])
    return [folder / 'seed', tmp_path / 'odd']

  return spoil


def put(array, index, value):
  array[index] = value
  return array


def another_model(tmp_path, folder, models):
  wider = dataclasses.replace(models['untied'], ffn_dim=64)
  save(tmp_path / 'odd', draw(wider, 5), wider)
  return [folder / 'seed', tmp_path / 'odd']


def another_tokenizer(tmp_path, folder, models):
  save(tmp_path / 'odd', draw(models['untied'], 5), models['untied'], tokenizer_hash='ab')
  return [folder / 'seed', tmp_path / 'odd']


def a_mixture(tmp_path, folder, models):
  save(tmp_path / 'odd', draw(models['btx'], 5), models['btx'])
  return [tmp_path / 'odd', folder / 'seed']


def a_flipped_bit(tmp_path, folder, models):
  shutil.copytree(folder / 'code', tmp_path / 'copy')
  path = tmp_path / 'copy' / 'checkpoints' / '7' / 'params'
  largest = max(path.rglob('d/*'), key=lambda file: file.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  return [folder / 'seed', tmp_path / 'copy']


REFUSED = {
  'respelled': (respelled, ['same checkpoint', '/seed', 'once']),
  'equal': (equal_otherwise_stored, ['same values', 'again', 'code']),
  'no array': (with_array('blocks/ffn/up', lambda x: None), ['odd', 'blocks/ffn/up of shape None']),
  'one array too many': (
    with_array('blocks/ffn/bias', lambda x: np.zeros(3, np.float32)),
    ['odd', 'blocks/ffn/bias', 'where None is wanted'],
  ),
  'another dtype': (
    with_array('final_norm/scale', lambda x: x.astype(np.float64)),
    ['odd', 'final_norm/scale', 'float64'],
  ),
  'another model': (another_model, ['odd', 'another model', 'ffn_dim: 48 -> 64']),
  'another tokenizer': (another_tokenizer, ['odd', 'another tokenizer']),
  'a mixture': (a_mixture, ['odd', 'is a mixture']),
  'a flipped bit': (a_flipped_bit, ['copy', 'damaged', 'other bytes']),
  'NaN in a layer': (
    with_array('blocks/ffn/up', lambda x: put(x, (1, 30, 47), np.nan)),
    ['odd', 'nan', 'blocks/ffn/up[1, 30, 47]'],
  ),
  'infinity in a chunk': (
    with_array('unembed/kernel', lambda x: put(x, (31, 300), -np.inf)),
    ['odd', '-inf', 'unembed/kernel[31, 300]'],
  ),
}


@pytest.mark.parametrize('spoil, words', REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_mixed(small_chunks, tmp_path, models, sources, spoil, words):
  paths = spoil(tmp_path, sources[0], models)
  before = {path for path in tmp_path.rglob('*') if 'checkpoints' not in path.parts}
  with pytest.raises(UserError) as caught:
    convert(tmp_path / 'mix', config.Upcycle(tuple(map(str, paths)), 'bam_kv_experts'))
  message = str(caught.value)
  assert '\n' not in message and message.endswith('.')
  assert all(word in message for word in words), message
  after = {path for path in tmp_path.rglob('*') if 'checkpoints' not in path.parts}
  assert after == before, 'no output, and nothing beside it'


def test_where_no_output_is_made(tmp_path, sources):
  folder, _ = sources
  for inside in ('seed/checkpoints/7/mix', 'seed/checkpoints/7/params/mix'):
    with pytest.raises(UserError, match='lies inside the source'):
      convert(folder / inside, how(folder, 'btx'))
    assert not (folder / inside).exists()
  (tmp_path / 'mix').mkdir()
  with pytest.raises(UserError, match='mix exists'):
    convert(tmp_path / 'mix', how(folder, 'btx'))
  assert list((tmp_path / 'mix').iterdir()) == []


def test_centroids_take_data(tmp_path, sources):
  with pytest.raises(UserError, match="'centroids'.*recipe"):
    convert(tmp_path / 'mix', how(sources[0], 'btx', router_init='centroids'))
