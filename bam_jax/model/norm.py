"""Normalisation of the residual stream and of heads; computed and returned in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from bam_jax.model import parameters


def layer_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """Normalises the last axis, with a scale and no bias."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  centred = x - x.mean(-1, keepdims=True)
  variance = jnp.mean(centred**2, -1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + epsilon) * scale


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """Divides the last axis by its root mean square; arXiv 1910.07467."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + epsilon) * scale


NORMS = {'layernorm': layer_norm, 'rmsnorm': rms_norm}


class Norm(nnx.Module):
  """A norm of D channels with a parameter `scale`, of the given shape, with D as its last axis."""

  def __init__(self, shape: tuple[int, ...], kind: str, epsilon: float):
    self.scale = parameters.full(shape, 1)
    self.function, self.epsilon = NORMS[kind], epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    """Float32, of the shape of `x`."""
    return self.function(x, self.scale[...], self.epsilon)
