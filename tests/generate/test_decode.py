"""Reading with a cache is the uncached forward pass, for every variant, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.generate import decode
from bam_jax.model import arithmetic, transformer
from bam_jax.parallel import sharding
from tests.generate.conftest import reader
from tests.model import odd

TOLERANCE = 1e-5  # of the largest score
MESHES = [(1, 1, 1, 1), (2, 2, 2, 1), (1, 1, 4, 1), (1, 2, 2, 2)]
PIECE, LENGTH, SLOTS = 7, 11, 16
FIRST = np.array([0, 3, 1, 6], np.int32)  # padding in front; the last row is one token at first
ODD = [name for name in odd.MODELS if name != 'room_for_all']
QUICK = {
  ('bam_kv_experts', (1, 1, 1, 1)),
  ('untied', (1, 2, 2, 2)),
  ('norms_of_shared_heads', (1, 2, 2, 2)),
  ('prefix', (1, 2, 2, 2)),
  ('embedding_experts', (1, 2, 2, 2)),
}


@pytest.fixture(scope='module')
def rows() -> np.ndarray:
  return np.random.default_rng(1).integers(0, 320, (len(FIRST), LENGTH)).astype(np.int32)


@pytest.fixture(scope='module')
def uncached(named, start, rows):
  """The function name -> scores BTV of the training model, all tokens at once, on one device."""

  @functools.cache
  def run(name: str) -> np.ndarray:
    network = transformer.Network(named(name).dropless(), config.Compute())
    slots = np.arange(LENGTH)
    segments = (slots >= FIRST[:, None]).astype(np.int32)
    positions = np.maximum(slots - FIRST[:, None], 0).astype(np.int32)

    @jax.jit
    def scores(params):
      return network.logits(params, network.hidden(params, rows, segments, positions)[0])

    return np.asarray(scores(start(name)))

  return run


def reader_of(model, dtype, shape):
  """The decoder on a mesh, its jitted `read`, and an empty cache."""
  mesh = sharding.make_mesh(config.Mesh(*shape))
  decoder = decode.Decoder(model, dtype, mesh)
  specs = decoder.specs()
  read = decoder.layout.spread(
    decoder.read, (*specs, decode.ROWS, decode.ROWS, P()), (decode.ROWS, specs[1])
  )
  cache = decoder.empty_cache(len(FIRST), SLOTS)
  return decoder, jax.jit(read, donate_argnums=1), cache


CASES = odd.cases(ODD, MESHES, QUICK, lambda name, shape: shape[2] <= 2 or 'six' not in name)


@pytest.mark.parametrize('name, shape', CASES)
def test_a_piece_and_then_token_by_token(named, start, uncached, rows, name, shape):
  decoder, read, cache = reader_of(named(name), 'float32', shape)
  params = decoder.place(reader(start(name)))
  wanted = uncached(name)
  pieces = [(0, PIECE), *((at, at + 1) for at in range(PIECE, LENGTH))]
  for begin, end in pieces:
    scores, cache = read(params, cache, rows[:, begin:end], FIRST, jnp.int32(begin))
    distance = np.abs(np.asarray(scores) - wanted[:, end - 1]).max()
    assert distance < TOLERANCE * np.abs(wanted).max()


def test_what_stands_before_the_first_token_is_not_seen(named, start, rows):
  decoder, read, cache = reader_of(named('bam_kv_experts'), 'float32', (1, 1, 1, 1))
  params = decoder.place(reader(start('bam_kv_experts')))
  others = np.where(np.arange(LENGTH) < FIRST[:, None], 5, rows)
  assert (others != rows).any()
  scores, cache = read(params, cache, rows, FIRST, jnp.int32(0))
  # Into the same cache, which is full of the other run's keys.
  again, _ = read(params, cache, others, FIRST, jnp.int32(0))
  np.testing.assert_array_equal(scores, again)


@pytest.mark.slow
def test_a_capacity_of_training_is_felt_there(named, start, rows):
  """Else the case above would say nothing."""
  network = transformer.Network(named('with_a_capacity'), config.Compute())
  ones, slots = np.ones_like(rows), np.tile(np.arange(LENGTH, dtype=np.int32), (len(rows), 1))
  _, routing = network.hidden(start('with_a_capacity'), rows, ones, slots)
  assert routing.ffn.dropped.sum() > 0


@pytest.mark.parametrize('shape', [(1, 1, 1, 1), (1, 2, 2, 2)])
def test_account_counts_the_arrays(model, shape):
  batch, slots = 4, 6
  mesh = sharding.make_mesh(config.Mesh(*shape))
  for dtype in ('float32', 'bfloat16'):
    decoder = decode.Decoder(model, dtype, mesh)
    arrays = jax.tree.leaves(decoder.empty_cache(batch, slots))
    counted = arithmetic.cache_bytes(model, dtype)
    assert sum(x.nbytes for x in arrays) == batch * slots * counted


def bytes_by_device(arrays) -> list[int]:
  held: dict = {}
  for shard in (shard for x in arrays for shard in x.addressable_shards):
    held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
  return list(held.values())


def test_each_expert_and_its_cache_lie_on_a_device_of_their_own(named, start):
  model = named('bam_kv_experts')
  decoder, _, cache = reader_of(model, 'float32', (1, 1, 4, 1))
  assert set(bytes_by_device(jax.tree.leaves(cache))) == {
    len(FIRST) * SLOTS * arithmetic.cache_bytes(model, 'float32') // 4
  }
  params = decoder.place(reader(start('bam_kv_experts')))
  layer, whole = params['blocks'][1]['attention'], start('bam_kv_experts')['blocks']['attention']
  for name in ('query', 'key', 'value', 'out'):
    (part,) = layer[name].parts
    for shard in part.addressable_shards:
      (expert,) = range(4)[shard.index[0]]
      np.testing.assert_array_equal(shard.data[0], whole[name][1, expert])


def test_parameters_are_placed_in_their_precisions(named, start):
  decoder, *_ = reader_of(named('norms_of_heads'), 'bfloat16', (1, 1, 1, 1))
  params = decoder.place(reader(start('norms_of_heads')))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
    lambda x: (x.shape, x.dtype), decoder.abstract_params()
  )
  layer = params['blocks'][0]
  assert layer['attention']['query'].dtype == layer['ffn']['up'].dtype == jnp.bfloat16
  assert params['embed']['table'].dtype == jnp.bfloat16
  for part in (layer['norm']['scale'], layer['ffn']['router'], layer['attention']['key_scale']):
    assert part.dtype == jnp.float32


@pytest.mark.parametrize('shape', [(1, 1, 8, 1), (1, 1, 1, 3)])
def test_a_mesh_that_does_not_divide_the_model(named, shape):
  mesh = sharding.make_mesh(config.Mesh(*shape))
  with pytest.raises(UserError, match='--mesh splits blocks/attention/key'):
    decode.Decoder(named('bam_kv_experts'), 'float32', mesh).check('--mesh')


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_a_device_has_its_hidden_columns_of_every_expert(models, platform):
  """Of four experts a token meets one: no device is to wait for the one that has it."""
  rng = np.random.default_rng(0)
  tree = transformer.Network(models['btx'], config.Compute()).abstract()
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)
  mesh = sharding.make_mesh(config.Mesh(1, 1, 2, 2))
  decoder = decode.Decoder(models['btx'], 'float32', mesh)
  decoder.layout.platform = platform
  placed = decoder.place(reader(params))
  for layer in range(2):
    for name in ('gate', 'up', 'down'):
      whole = params['blocks']['ffn'][name][layer]  # EDF, or EFD
      array = placed['blocks'][layer]['ffn'][name]
      assert isinstance(array, jax.Array) == (platform == 'tpu')
      parts = [array] if platform == 'tpu' else array.parts
      seen = np.zeros(whole.shape, int)
      for number, part in enumerate(parts):
        mine = whole if platform == 'tpu' else whole[number : number + 1]
        for shard in part.addressable_shards:
          np.testing.assert_array_equal(shard.data, mine[shard.index])
          count = seen if platform == 'tpu' else seen[number : number + 1]
          count[shard.index] += 1
          assert shard.data.shape[0] == mine.shape[0] and shard.data.size == mine.size // 4
      assert (seen == 1).all()


def test_a_mesh_that_does_not_divide_the_hidden_columns(models):
  # 48 columns: 32 parts do not divide them, whatever the number of experts.
  decoder = decode.Decoder(models['btx'], 'float32', sharding.make_mesh(config.Mesh(1, 1, 4, 2)))
  decoder.layout.sizes = decoder.layout.sizes | {'expert': 32, 'tensor': 1}
  with pytest.raises(UserError, match=r'^config.runs.x.mesh splits blocks/ffn/down .* into 32'):
    decoder.check('config.runs.x.mesh')
