"""The parallel block of every variant: `y = LN(x); x + Attention(y) + FFN(y)`; paper section 2."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bam_jax import config
from bam_jax.model import attention, ffn, norm, router


class Routing(NamedTuple):
  """Statistics of the two routers; None where the model has no such router."""

  attention: router.Statistics | None
  ffn: router.Statistics | None


class LayerNorm(nnx.Module):
  """Layer normalisation with a scale and no bias, in float32."""

  def __init__(self, shape: tuple[int, ...], epsilon: float):
    self.scale = nnx.Param(jnp.ones(shape, jnp.float32))
    self.epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis; the result is float32."""
    return norm.layer_norm(x, self.scale[...], self.epsilon)


class Block(nnx.Module):
  """One norm, then attention and FFN side by side."""

  def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
    """Parameters of all the layers, stacked on axis 0; `__call__` takes one layer's slice."""
    dense = attention.Attention, ffn.FFN
    mixture = attention.MixtureOfAttention, ffn.MixtureOfFFN
    self.norm = LayerNorm((model.num_layers, model.d_model), model.norm_epsilon)
    self.attention = (mixture if model.attention_experts else dense)[0](model, rngs=rngs)
    self.ffn = (mixture if model.ffn_experts else dense)[1](model, rngs=rngs)

  def __call__(
    self, x_BTD: jax.Array, turn: Callable, attend: attention.Attend, real_BT: jax.Array
  ) -> tuple[jax.Array, Routing]:
    """The residual stream after the block, and what its routers did.

    Args:
      x_BTD: the residual stream, in the compute dtype.
      turn: rotary embedding at the tokens' positions.
      attend: the attention kernel for the tokens' segments.
      real_BT: false on padding.
    """
    y_BTD = self.norm(x_BTD)
    attended_BTD, attention_stats = self.attention(y_BTD, turn, attend, real_BT)
    ffn_BTD, ffn_stats = self.ffn(y_BTD, real_BT)
    return x_BTD + attended_BTD + ffn_BTD, Routing(attention_stats, ffn_stats)
