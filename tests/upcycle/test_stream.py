"""Streaming makes what memory makes, bit for bit; what does not fit it refuses in a sentence."""

import dataclasses
import hashlib
import shutil
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays, manifest
from bam_jax.config import strict
from bam_jax.errors import UserError
from bam_jax.model import transformer
from bam_jax.parallel import sharding
from bam_jax.recipes import graph, runner
from bam_jax.upcycle import merge, rules, stream

METHODS = typing.get_args(config.Method)
NAMES = ('seed', 'code', 'law')
TOKENIZER = b'{"a tokenizer": 1}'


def abstract(model: config.Model) -> dict:
  return transformer.Network(model, config.Compute()).abstract()


def flat(tree: dict) -> dict[str, np.ndarray]:
  return traverse_util.flatten_dict(tree, sep='/')


def draw(model: config.Model, seed: int) -> dict:
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract(model))


def save(folder, params: dict, model: config.Model, step: int = 7, **changes) -> None:
  """A run's folder with one checkpoint, its tokenizer and a bit of an optimizer's state."""
  facts = dict(
    format=checkpoint.FORMAT,
    model=model,
    sequence_length=16,
    tokenizer_hash=hashlib.sha256(TOKENIZER).hexdigest(),
    tokenizer_path='/nowhere',
    run=folder.name,
    step=step,
    method=None,
    sources=(),
    versions=manifest.versions(),
  )
  checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', keep=2)
  meta = checkpoint.Meta(**(facts | changes))
  checkpoints.save(step, params, {'count': np.zeros(())}, {}, meta)
  checkpoints.close()
  (folder / 'tokenizer.json').write_bytes(TOKENIZER)


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
      placed = jax.device_put(made[-1], sharding.tree(abstract(model), mesh))
      save(folder / name, placed, model)
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
  return stream.upcycle(output, upcycle, **(facts | changes))


COPIES = dict(num_experts=5)
OPTIONS = {
  'defaults': {},
  'copies': COPIES,
  'first': dict(average='first'),
  'weighted': dict(average='weighted', weights=(1.0, 2.0, 5.0)),
  'dropped': dict(drop_ratio=0.3, **COPIES),
  'noise': dict(noise=0.1, **COPIES),
  'zero': dict(router_init='zero', **COPIES),
  'everything': dict(
    drop_ratio=0.5, noise=0.05, average='first', expert_bias=True, router_scale=2.0, top_k=2,
    renormalize=True, capacity_factor=1.5, **COPIES,
  ),
}  # fmt: skip


def cases():
  for method in METHODS:
    for name, changes in OPTIONS.items():
      if method == 'average' and name not in ('defaults', 'first', 'weighted'):
        continue
      if method == 'sparse' and name == 'weighted':
        changes = dict(average='weighted', weights=(2.0,))
      yield pytest.param(method, changes, id=f'{method}-{name}')


@pytest.mark.parametrize('method, changes', list(cases()))
def test_the_same_bits_as_in_memory(small_chunks, tmp_path, models, sources, method, changes):
  folder, params = sources
  upcycle = how(folder, method, **changes)
  meta = convert(tmp_path / 'mix', upcycle)
  mixture = rules.mixture_model(models['untied'], upcycle)
  assert meta.model == mixture and checkpoint.read_meta(tmp_path / 'mix') == meta
  key = merge.run_key(3, 'bam')
  want = merge.merge(params[: len(upcycle.sources)], abstract(mixture), mixture, upcycle, key)
  got = checkpoint.restore_host_params(tmp_path / 'mix', abstract(mixture))
  for path, array in flat(want).items():
    np.testing.assert_array_equal(flat(got)[path], array, err_msg=path, strict=True)


@settings(max_examples=8, deadline=None)
@given(chunk=st.integers(1000, 20_000), ahead=st.integers(1, 20_000), pending=st.integers(0, 9000))
def test_no_size_of_pieces_changes_a_bit(tmp_path_factory, sources, chunk, ahead, pending):
  folder, params = sources
  output = tmp_path_factory.mktemp('made') / 'mix'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(arrays, 'CHUNK_BYTES', chunk)
    patch.setattr(arrays, 'READ_BYTES', ahead)
    patch.setattr(arrays, 'PENDING_BYTES', pending)
    meta = convert(output, how(folder, 'btx', noise=0.1, num_experts=4))
  want = merge.merge(
    params, abstract(meta.model), meta.model, meta.manifest.upcycle, merge.run_key(3, 'bam')
  )
  got = checkpoint.restore_host_params(output, abstract(meta.model))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  for source, mine in zip(meta.manifest.sources, params):
    assert source.array_hashes == {p: direct_hash(array) for p, array in flat(mine).items()}


def direct_hash(array: np.ndarray) -> str:
  """As the documentation has it."""
  sha256 = hashlib.sha256
  return sha256(b''.join(sha256(part.tobytes()).digest() for part in array)).hexdigest()


@pytest.mark.parametrize('method', METHODS)
def test_bfloat16(tmp_path, sources, method):
  folder, _ = sources
  for dtype in ('float32', 'bfloat16'):
    meta = convert(tmp_path / dtype, how(folder, method), dtype=dtype)
  full, half = (arrays.Reader(tmp_path / dtype / 'params') for dtype in ('float32', 'bfloat16'))
  for path, spec in half.specs.items():
    assert spec.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.read(path), full.read(path).astype(jnp.bfloat16))
  # Whoever restores it asks for float32, on a mesh or not.
  mesh = sharding.make_mesh(config.Mesh(1, 2, 1, 2))
  wanted = checkpoint.abstract(abstract(meta.model), sharding.tree(abstract(meta.model), mesh))
  placed = checkpoint.restore_params(tmp_path / 'bfloat16', wanted)
  on_host = checkpoint.restore_host_params(tmp_path / 'bfloat16', abstract(meta.model))
  for path, array in flat(placed).items():
    assert array.dtype == np.float32 and flat(on_host)[path].dtype == np.float32
    np.testing.assert_array_equal(array, half.read(path).astype(np.float32))
    np.testing.assert_array_equal(flat(on_host)[path], array)


def test_converted_checkpoints_are_sources(tmp_path, sources):
  folder, params = sources
  soup = dict(seed=0, name='', dtype='bfloat16')
  convert(tmp_path / 'soup', how(folder, 'average'), **soup)
  upcycle = config.Upcycle((str(tmp_path / 'soup'), str(folder / 'law')), 'btx')
  meta = convert(tmp_path / 'mix', upcycle)
  # bfloat16 is widened before anything is computed.
  average = arrays.Reader(tmp_path / 'soup' / 'params').read('embed/table').astype(np.float32)
  want = (average + flat(params[2])['embed/table']) / 2
  np.testing.assert_array_equal(
    arrays.Reader(tmp_path / 'mix' / 'params').read('embed/table'), want, strict=True
  )
  assert meta.sources == ('soup', 'law')


def test_with_a_recipes_seed_and_name_it_is_the_recipes_mixture(
  tmp_path, models, recipe_dict, dataset
):
  parsed = config.parse(recipe_dict | {'seed': 11})
  for number, name in enumerate(NAMES):
    save(tmp_path / name, draw(models['dense'], number), models['dense'])
  nodes = graph.resolve(parsed)
  mesh = sharding.make_mesh(config.Mesh())
  layout = lambda node: sharding.tree(abstract(node.model), mesh)
  make = lambda r, n: runner.initial_params(r, n, n['bam'], tmp_path, dataset, layout(n['bam']))
  want = make(parsed, nodes)
  convert(tmp_path / 'mix', how(tmp_path, 'bam_kv_experts'), seed=11, name='bam')
  got = checkpoint.restore_host_params(tmp_path / 'mix', abstract(nodes['bam'].model))
  jax.tree.map(np.testing.assert_array_equal, got, want)

  # And a recipe starts from the converted one.
  recipe_dict['runs']['bam']['init'] = {'checkpoint': str(tmp_path / 'mix')}
  parsed = config.parse(recipe_dict)
  started = make(parsed, graph.resolve(parsed))
  jax.tree.map(np.testing.assert_array_equal, started, want)


def test_what_the_manifest_says(tmp_path, models, sources):
  folder, params = sources
  upcycle = how(folder, 'bam_shared_kv', num_experts=4, noise=0.5)
  convert(tmp_path / 'mix', upcycle, command='python -m bam_jax.convert upcycle ...')
  meta = checkpoint.read_meta(tmp_path / 'mix')
  assert (meta.run, meta.step, meta.method) == ('bam', 0, 'bam_shared_kv')
  assert meta.sources == ('seed', 'code', 'law', 'seed')
  made = meta.manifest
  assert made.upcycle == upcycle and (made.seed, made.name) == (3, 'bam')
  assert made.command == 'python -m bam_jax.convert upcycle ...' and made.time.endswith('+00:00')
  reader = arrays.Reader(tmp_path / 'mix' / 'params')
  assert sorted(row.target for row in made.made) == sorted(reader.specs)
  hows = {row.target: (row.how, row.source) for row in made.made}
  assert hows['blocks/attention/key'] == ('mean', 'blocks/attention/key')
  assert hows['blocks/ffn/up'] == ('stack', 'blocks/ffn/up')
  assert hows['blocks/ffn/router'] == ('router', None)
  for name, source, mine in zip(NAMES, made.sources, params, strict=True):
    assert source.path == str(folder / name / 'checkpoints' / '7')
    assert (source.run, source.step) == (name, 7)
    hashes = {path: direct_hash(array) for path, array in flat(mine).items()}
    assert source.array_hashes == hashes
    lines = ''.join(f'{path} {hashes[path]}\n' for path in sorted(hashes))
    assert source.hash == hashlib.sha256(lines.encode()).hexdigest()
  assert strict.from_dict(checkpoint.Meta, strict.to_dict(meta), 'meta') == meta


def test_the_checkpoint_describes_itself(tmp_path, sources):
  folder, _ = sources
  convert(tmp_path / 'mix', how(folder, 'btx'))
  names = sorted(one.name for one in (tmp_path / 'mix').iterdir())
  assert names == ['checksums', 'meta', 'params', 'tokenizer.json']
  assert checkpoint.find(tmp_path / 'mix') == tmp_path / 'mix'
  (tmp_path / 'mix').rename(tmp_path / 'moved')
  found = checkpoint.find_tokenizer(tmp_path / 'moved')
  assert found == tmp_path / 'moved' / 'tokenizer.json' and found.read_bytes() == TOKENIZER


def test_without_a_name_the_folder_does_not_matter(tmp_path, sources):
  folder, _ = sources
  for output in ('one', 'two'):
    convert(tmp_path / output, how(folder, 'btx'), name='')
  convert(tmp_path / 'three', how(folder, 'btx'), name='', seed=4)
  routers = [
    arrays.Reader(tmp_path / output / 'params').read('blocks/ffn/router')
    for output in ('one', 'two', 'three')
  ]
  np.testing.assert_array_equal(routers[0], routers[1])
  assert (routers[0] != routers[2]).all()


def test_progress_ends_at_all_bytes(tmp_path, sources):
  folder, params = sources
  seen = []
  meta = convert(tmp_path / 'mix', how(folder, 'btx'), progress=lambda *both: seen.append(both))
  assert [done for done, _ in seen] == sorted({done for done, _ in seen})
  read = sum(array.nbytes for mine in params for array in flat(mine).values())
  written = sum(4 * np.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(meta.model)))
  assert seen[-1] == (read + written, read + written)


# What is refused. Each function spoils something below `tmp_path` and names the sources.


def copied(tmp_path, folder, name='code'):
  """A copy of a source, to spoil."""
  shutil.copytree(folder / name, tmp_path / 'copy')
  return tmp_path / 'copy'


def respelled(tmp_path, folder, models):
  return [folder / 'seed', folder / 'code', folder / 'seed' / 'checkpoints' / '7']


def linked(tmp_path, folder, models):
  (tmp_path / 'link').symlink_to(folder / 'seed')
  return [folder / 'seed', tmp_path / 'link']


def equal(tmp_path, folder, models):
  return [folder / 'code', folder / 'law', copied(tmp_path, folder)]


def equal_otherwise_stored(tmp_path, folder, models):
  save(tmp_path / 'again', draw(models['untied'], 1), models['untied'], step=8)
  return [folder / 'seed', folder / 'code', tmp_path / 'again']


def missing(tmp_path, folder, models):
  return [folder / 'seed', folder / 'nowhere']


def no_array(tmp_path, folder, models):
  params = draw(models['untied'], 5)
  del params['blocks']['ffn']['up']
  save(tmp_path / 'odd', params, models['untied'])
  return [folder / 'seed', tmp_path / 'odd']


def one_array_too_many(tmp_path, folder, models):
  params = draw(models['untied'], 5)
  params['blocks']['ffn']['bias'] = np.zeros(3, np.float32)
  save(tmp_path / 'odd', params, models['untied'])
  return [folder / 'seed', tmp_path / 'odd']


def of_another_shape(tmp_path, folder, models):
  params = draw(models['untied'], 5)
  params['blocks']['ffn']['up'] = np.zeros((2, 32, 47), np.float32)
  save(tmp_path / 'odd', params, models['untied'])
  return [folder / 'seed', tmp_path / 'odd']


def of_another_dtype(tmp_path, folder, models):
  params = draw(models['untied'], 5)
  params['final_norm']['scale'] = params['final_norm']['scale'].astype(np.float64)
  save(tmp_path / 'odd', params, models['untied'])
  return [folder / 'seed', tmp_path / 'odd']


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


def newer(tmp_path, folder, models):
  path = copied(tmp_path, folder) / 'checkpoints' / '7' / 'meta' / 'metadata'
  path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
  shutil.rmtree(path.parents[1] / 'checksums')  # which are of the other text
  return [folder / 'seed', tmp_path / 'copy']


def damaged_meta(tmp_path, folder, models):
  (copied(tmp_path, folder) / 'checkpoints' / '7' / 'meta' / 'metadata').write_text('{')
  return [folder / 'seed', tmp_path / 'copy']


def without_parameters(tmp_path, folder, models):
  shutil.rmtree(copied(tmp_path, folder) / 'checkpoints' / '7' / 'params')
  return [folder / 'seed', tmp_path / 'copy']


def damaged_values(tmp_path, folder, models):
  path = copied(tmp_path, folder) / 'checkpoints' / '7' / 'params'
  for file in path.rglob('d/*'):
    file.write_bytes(file.read_bytes()[:10])
  return [folder / 'seed', tmp_path / 'copy']


def a_flipped_bit(tmp_path, folder, models):
  path = copied(tmp_path, folder) / 'checkpoints' / '7' / 'params'
  largest = max(path.rglob('d/*'), key=lambda file: file.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  return [folder / 'seed', tmp_path / 'copy']


def without_tokenizer(tmp_path, folder, models):
  (copied(tmp_path, folder) / 'tokenizer.json').unlink()
  return [tmp_path / 'copy', folder / 'seed']


def tokenizer_changed(tmp_path, folder, models):
  (copied(tmp_path, folder) / 'tokenizer.json').write_text('{}')
  return [tmp_path / 'copy', folder / 'seed']


def not_a_number(path, index, value):
  def spoil(tmp_path, folder, models):
    params = draw(models['untied'], 5)
    flat(params)[path][index] = value
    save(tmp_path / 'odd', params, models['untied'])
    return [folder / 'seed', tmp_path / 'odd']

  return spoil


REFUSED = {
  'respelled': (respelled, ['same checkpoint', '/seed', 'once']),
  'linked': (linked, ['same checkpoint', 'link']),
  'equal': (equal, ['same values', 'copy', 'code']),
  'equal, stored otherwise': (equal_otherwise_stored, ['same values', 'again', 'code']),
  'missing': (missing, ['nowhere', 'holds no checkpoint']),
  'no array': (no_array, ['odd', 'has no blocks/ffn/up']),
  'one array too many': (one_array_too_many, ['odd', 'blocks/ffn/bias', 'no rule']),
  'another shape': (of_another_shape, ['odd', 'blocks/ffn/up', '(2, 32, 47)', '(2, 32, 48)']),
  'another dtype': (of_another_dtype, ['odd', 'final_norm/scale', 'float64']),
  'another model': (another_model, ['odd', 'another model', 'ffn_dim: 48 -> 64']),
  'another tokenizer': (another_tokenizer, ['odd', 'another tokenizer']),
  'a mixture': (a_mixture, ['odd', 'is a mixture']),
  'newer': (newer, ['copy', 'format 2', 'upgrade']),
  'damaged meta': (damaged_meta, ['copy', 'meta', 'damaged']),
  'without parameters': (without_parameters, ['copy', 'params', 'damaged']),
  'damaged values': (damaged_values, ['copy', 'damaged']),
  'a flipped bit': (a_flipped_bit, ['copy', 'damaged', 'other bytes']),
  'without tokenizer': (without_tokenizer, ['copy', 'lost its tokenizer']),
  'tokenizer changed': (tokenizer_changed, ['copy', 'lost its tokenizer']),
  'NaN in a layer': (
    not_a_number('blocks/ffn/up', (1, 30, 47), np.nan),
    ['odd', 'nan', 'blocks/ffn/up[1, 30, 47]'],
  ),
  'infinity in a chunk': (
    not_a_number('unembed/kernel', (31, 300), -np.inf),
    ['odd', '-inf', 'unembed/kernel[31, 300]'],
  ),
  'NaN in a vector': (
    not_a_number('final_norm/scale', (3,), np.nan),
    ['odd', 'nan', 'final_norm/scale[3]'],
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
  for word in words:
    assert word in message
  after = {path for path in tmp_path.rglob('*') if 'checkpoints' not in path.parts}
  assert after == before, 'no output, and nothing beside it'


@pytest.mark.parametrize('inside', ['seed/checkpoints/7/mix', 'seed/checkpoints/7/params/mix'])
def test_a_source_is_not_written_into(sources, inside):
  folder, _ = sources
  with pytest.raises(UserError, match='lies inside the source'):
    convert(folder / inside, how(folder, 'btx'))
  assert not (folder / inside).exists()


def test_an_existing_output_is_kept(tmp_path, sources):
  (tmp_path / 'mix').mkdir()
  with pytest.raises(UserError, match='mix exists'):
    convert(tmp_path / 'mix', how(sources[0], 'btx'))
  assert list((tmp_path / 'mix').iterdir()) == []


def test_centroids_take_data(tmp_path, sources):
  with pytest.raises(UserError, match="'centroids'.*recipe"):
    convert(tmp_path / 'mix', how(sources[0], 'btx', router_init='centroids'))
