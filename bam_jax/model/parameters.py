"""How parameters are initialised, and in which precision each of them is used."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

# Used in float32 whatever the compute dtype: a router's choice and a norm's scale are too coarse in
# bfloat16, and too small to save anything.
SCALES = frozenset(  # of norms, and a norm's bias
  'scale bias query_scale key_scale query_shared_scale key_shared_scale'.split()
)
BIASES = frozenset(  # of projections
  f'{name}_bias' for name in ('query', 'key', 'value', 'out', 'gate', 'up', 'down')
)
ROUTERS = frozenset({'router', 'expert_bias'})
FLOAT32_NAMES = SCALES | ROUTERS
UNDECAYED = SCALES | BIASES | {'expert_bias'}  # by weight decay


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, scale: float = 1.0) -> nnx.Param:
  """A float32 parameter, normal with standard deviation `scale / sqrt(fan_in)`."""
  deviation = scale / math.sqrt(fan_in)
  return nnx.Param(deviation * jax.random.normal(rngs.params(), shape, jnp.float32))


def full(shape: tuple[int, ...], value: float) -> nnx.Param:
  """A float32 parameter, the same value everywhere."""
  return nnx.Param(jnp.full(shape, value, jnp.float32))


def dtype_of(name: str, dtype: jnp.dtype) -> jnp.dtype:
  """The dtype in which a parameter is used, by the last part of its path."""
  return jnp.dtype(jnp.float32 if name in FLOAT32_NAMES else dtype)


def cast(params: dict, dtype: jnp.dtype) -> dict:
  """`params` in the compute dtype, except those of FLOAT32_NAMES, which stay as they are."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x if path[-1].key in FLOAT32_NAMES else x.astype(dtype), params
  )
