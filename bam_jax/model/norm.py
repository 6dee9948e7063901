"""Normalisation of the residual stream and of heads; computed and returned in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from bam_jax import config
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


def factor(model: config.Model, scale: jax.Array) -> jax.Array:
  """What a norm of a model multiplies by, given its parameter."""
  return 1 + scale if model.norm == 'rmsnorm_plus_one' else scale


def new_scale(model: config.Model, shape: tuple[int, ...]) -> nnx.Param:
  """A parameter whose `factor` is 1."""
  return parameters.full(shape, 0 if model.norm == 'rmsnorm_plus_one' else 1)


def normalize(
  model: config.Model, x: jax.Array, scale: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
  """The norm of a model's residual stream; float32, of the shape of `x`."""
  norm = layer_norm if model.norm in ('layernorm', 'layernorm_bias') else rms_norm
  y = norm(x, factor(model, scale), model.norm_epsilon)
  return y if bias is None else y + bias


class Norm(nnx.Module):
  """A norm with a `scale`, and perhaps a `bias`, of the given shape, with D as its last axis."""

  def __init__(self, shape: tuple[int, ...], model: config.Model):
    self.model, self.scale = model, new_scale(model, shape)
    self.bias = parameters.full(shape, 0) if model.norm == 'layernorm_bias' else None

  def __call__(self, x: jax.Array) -> jax.Array:
    """As in `normalize`."""
    bias = None if self.bias is None else self.bias[...]
    return normalize(self.model, x, self.scale[...], bias)
