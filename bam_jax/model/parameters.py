"""How parameters start, and in which precision each of them is used."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

# Used in float32 whatever the compute dtype: a router's choice and a norm's scale are too coarse in
# bfloat16, and too small to save anything.
FLOAT32_NAMES = frozenset({'scale', 'router'})


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, scale: float = 1.0) -> nnx.Param:
  """A float32 parameter, normal with standard deviation `scale / sqrt(fan_in)`."""
  deviation = scale / math.sqrt(fan_in)
  return nnx.Param(deviation * jax.random.normal(rngs.params(), shape, jnp.float32))


def cast(params: dict, dtype: jnp.dtype) -> dict:
  """`params` in the compute dtype, except those of FLOAT32_NAMES."""

  def cast_one(path, leaf):
    return leaf if path[-1].key in FLOAT32_NAMES else leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast_one, params)
