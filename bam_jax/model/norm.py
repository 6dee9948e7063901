"""Layer normalisation, of the residual stream and of single heads."""

import jax
import jax.numpy as jnp
from flax import nnx

from bam_jax.model import parameters


def layer_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """Normalises the last axis, with a scale and no bias; computed and returned in float32."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  centred = x - x.mean(-1, keepdims=True)
  variance = jnp.mean(centred**2, -1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + epsilon) * scale


class LayerNorm(nnx.Module):
  """`layer_norm` with a parameter `scale` of the given shape."""

  def __init__(self, shape: tuple[int, ...], epsilon: float):
    self.scale = parameters.full(shape, 1)
    self.epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    """Float32, of the shape of `x`."""
    return layer_norm(x, self.scale[...], self.epsilon)
