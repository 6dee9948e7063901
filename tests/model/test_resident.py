"""Where the weights of generation lie."""

import jax
import numpy as np
import pytest

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.model import decode, transformer
from bam_jax.parallel import sharding

FFN = ('gate', 'up', 'down')


@pytest.fixture(scope='module')
def tree(models):
  return transformer.Network(models['btx'], config.Compute()).abstract()


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_a_device_has_its_hidden_columns_of_every_expert(models, tree, platform):
  """Of four experts a token meets one: no device is to wait for the one that has it."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)
  mesh = sharding.make_mesh(config.Mesh(1, 1, 2, 2))
  placed = decode.Decoder(models['btx'], 'float32', mesh, platform).place(decode.reader(params))
  for layer in range(2):
    for name in FFN:
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
  with pytest.raises(UserError, match=r'^config.runs.x.mesh cuts blocks/ffn/down .* into 32 parts'):
    decoder.check('config.runs.x.mesh')
