"""Models by name, those of tests/model/odd.py too, and parameters to start from."""

import functools

import jax
import numpy as np
import pytest

from bam_jax import config
from bam_jax.model import transformer
from bam_jax.parallel import sharding
from tests.model import odd


@pytest.fixture(scope='session')
def named(models):
  """The function from a name to its model."""

  return functools.partial(odd.named, models)


@pytest.fixture(scope='session')
def start(named):
  """Parameters of each model, as NumPy arrays; scales and biases are not all equal."""

  @functools.cache
  def make(name: str) -> dict:
    network = transformer.Network(named(name), config.Compute())
    params = jax.device_get(jax.jit(network.init)(jax.random.key(3)))
    rng = np.random.default_rng(0)

    def stir(path, x):
      odd = sharding.path_of(path).split('/')[-1].endswith(('scale', 'bias'))
      return (x + 0.2 * rng.normal(size=x.shape)).astype(x.dtype) if odd else x

    return jax.tree_util.tree_map_with_path(stir, params)

  return make
