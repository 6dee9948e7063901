"""A checkpoint gets the bits that a mesh gets; what does not fit is refused in a sentence."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays
from bam_jax.config import strict
from bam_jax.convert import writing
from bam_jax.errors import UserError
from bam_jax.parallel import sharding
from bam_jax.recipes import graph, start
from bam_jax.upcycle import merge, rules
from bam_jax.upcycle.sources import open_checkpoint
from tests.upcycle.memory import NAMES, TOKENIZER, abstract, draw, flat, save, spelled_out, values

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
  opened = [open_checkpoint(path) for path in upcycle.sources]
  return writing.to_checkpoint(output, opened, upcycle, **(facts | changes))


OPTIONS = {
  'folded': dict(norms='fold'),
  'weighted': dict(average='weighted', weights=(1.0, 2.0, 5.0)),
  'everything': dict(
    average='first', expert_bias=True, router_scale=2.0, top_k=2,
    renormalize=True, capacity_factor=1.5,
  ),
  'zero': dict(router_init='zero'),
}  # fmt: skip


@pytest.mark.parametrize('method, name', [
  ('bam_kv_experts', 'everything'), ('bam_shared_kv', 'folded'), ('btx', 'zero'),
  ('sparse', 'everything'), ('average', 'weighted'),
  pytest.param('bam_shared_kv', 'everything', marks=pytest.mark.slow),
])  # fmt: skip
def test_the_numbers_that_are_spelled_out(small_chunks, tmp_path, models, sources, method, name):
  folder, params = sources
  changes = OPTIONS[name] | ({} if method == 'average' else {'num_experts': 5})
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
  jax.tree.map(np.testing.assert_array_equal, values(tmp_path / 'mix'), flat(want))

  # And a recipe starts from the converted one.
  recipe_dict['runs']['bam']['init'] = {'checkpoint': str(tmp_path / 'mix')}
  parsed = config.parse(recipe_dict)
  jax.tree.map(np.testing.assert_array_equal, make(parsed, graph.resolve(parsed)), want)


def test_each_attention_expert_keeps_its_sources_rotation(tmp_path, models):
  """A base model and its mathematics model may have other thetas; shared keys cannot."""
  yarn = config.RopeScaling('yarn', 4.0, 64)
  for number, (name, changes) in enumerate(
    {'seed': {}, 'code': {'rope_theta': 500.0, 'rope_scaling': yarn}, 'law': {}}.items()
  ):
    model = dataclasses.replace(models['dense'], **changes)
    save(tmp_path / name, draw(model, number), model, sequence_length=64 - number)
  meta = convert(tmp_path / 'mix', how(tmp_path, 'bam_kv_experts', num_experts=4))
  own = config.Rope(1e4)
  assert meta.model.attention_experts.ropes == (own, config.Rope(500.0, yarn), own, own)
  assert meta.model.rope_theta == 1e4 and meta.sequence_length == 62
  assert checkpoint.read_meta(tmp_path / 'mix') == meta
  for method in ('bam_shared_kv', 'btx', 'average'):
    with pytest.raises(UserError, match='rope_theta: 10000.0 -> 500.0.*only method bam_kv_experts'):
      convert(tmp_path / 'other', how(tmp_path, method))


def test_rows_of_words_that_only_others_have_are_dropped(small_chunks, tmp_path, models):
  """One has 16 more words than the seed, another 8 rows fewer of padding."""
  drawn = []
  for number, (name, words) in enumerate({'seed': 320, 'code': 336, 'law': 312}.items()):
    model = dataclasses.replace(models['untied'], vocab_size=words)
    drawn.append(draw(model, number))
    save(tmp_path / name, drawn[-1], model)
  meta = convert(tmp_path / 'mix', how(tmp_path, 'btx'))
  assert meta.model.vocab_size == 320
  got = values(tmp_path / 'mix')
  for path, axis in (('embed/table', 0), ('unembed/kernel', 1)):
    seed, code, law = (np.moveaxis(flat(params)[path], axis, 0) for params in drawn)
    law = np.concatenate([law, seed[312:]])
    want = (seed + code[:320] + law) / 3
    np.testing.assert_array_equal(np.moveaxis(got[path], axis, 0), want)


def direct_hash(array: np.ndarray) -> str:
  """As the documentation has it."""
  sha256 = hashlib.sha256
  return sha256(b''.join(sha256(part.tobytes()).digest() for part in array)).hexdigest()


def test_bfloat16(tmp_path, sources):
  folder, _ = sources
  for dtype in ('float32', 'bfloat16'):
    meta = convert(tmp_path / dtype, how(folder, 'bam_shared_kv'), dtype=dtype)
  full, half = (values(tmp_path / dtype) for dtype in ('float32', 'bfloat16'))
  for path, array in half.items():
    assert array.dtype == jnp.bfloat16
    np.testing.assert_array_equal(array, full[path].astype(jnp.bfloat16))
  # Whoever restores it asks for float32.
  mesh = sharding.make_mesh(config.Mesh(1, 2, 1, 2))
  wanted = sharding.abstract(abstract(meta.model), sharding.tree(abstract(meta.model), mesh))
  placed = checkpoint.restore_params(tmp_path / 'bfloat16', wanted)
  for path, array in flat(placed).items():
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, half[path].astype(np.float32))


def test_what_the_checkpoint_says_of_itself(tmp_path, models, sources):
  folder, params = sources
  upcycle = how(folder, 'bam_shared_kv', num_experts=4)
  convert(tmp_path / 'mix', upcycle, command='the command')
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
  # Without a name, neither the folder's name nor anything but the seed decides what is drawn.
  drawn = []
  for output, seed in (('one', 3), ('two', 3), ('three', 4)):
    convert(tmp_path / output, how(folder, 'btx'), name='', seed=seed)
    drawn.append(values(tmp_path / output)['blocks/ffn/router'])
  assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).all()


REFUSED = {
  'the same again': ['same checkpoint', '/seed', 'once'],
  'the same values': ['same values', 'odd', 'code'],
  'no array': ['odd', 'blocks/ffn/up of shape None'],
  'another dtype': ['odd', 'final_norm/scale', 'float64'],
  'another model': ['odd', 'differs from the model', 'ffn_dim: 48 -> 64'],
  'no tokenizer': ['odd', 'lacks its tokenizer'],
  'a mixture': ['odd', 'is a mixture'],
  'NaN': ['odd', 'nan', 'blocks/ffn/up[1, 30, 47]'],
  'a flipped bit': ['odd', 'damaged', 'does not match its checksum'],
}


@pytest.mark.parametrize('case, words', REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_mixed(small_chunks, tmp_path, models, sources, case, words):
  folder, odd, model, facts = sources[0], tmp_path / 'odd', models['untied'], {}
  if case == 'another model':
    model = dataclasses.replace(model, ffn_dim=64)
  if case == 'a mixture':
    model = models['btx']
  params = draw(model, 1 if case == 'the same values' else 5)
  if case == 'no array':
    del params['blocks']['ffn']['up']
  if case == 'another dtype':
    params['final_norm']['scale'] = params['final_norm']['scale'].astype(np.float64)
  if case == 'NaN':
    params['blocks']['ffn']['up'][1, 30, 47] = np.nan
  if case == 'no tokenizer':
    facts = {'tokenizer_hash': 'ab'}
  save(odd, params, model, **facts)
  if case == 'a flipped bit':
    path = odd / 'checkpoints' / '7' / 'params'
    largest = max(path.rglob('d/*'), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
  paths = [folder / 'seed', folder / 'code', odd]
  if case == 'the same again':
    paths[2] = folder / 'seed' / 'checkpoints' / '7'
  with pytest.raises(UserError) as caught:
    convert(tmp_path / 'mix', config.Upcycle(tuple(map(str, paths)), 'bam_kv_experts'))
  message = str(caught.value)
  assert '\n' not in message and message.endswith('.')
  assert all(word in message for word in words), message
  assert [path.name for path in tmp_path.iterdir()] == ['odd'], 'no output, and nothing beside it'


def test_where_no_output_is_made(tmp_path, sources):
  folder, _ = sources
  (tmp_path / 'mix').mkdir()
  with pytest.raises(UserError, match='mix exists'):
    convert(tmp_path / 'mix', how(folder, 'btx'))
  assert list((tmp_path / 'mix').iterdir()) == []
