"""The parallel block of every variant: `y = LN(x); x + Attention(y) + FFN(y)`; paper section 2."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bam_jax import config
from bam_jax.model import attention, ffn, norm, router
from bam_jax.model.tokens import Tokens
from bam_jax.parallel.collectives import Layout


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

  def __init__(self, model: config.Model, layout: Layout, *, rngs: nnx.Rngs):
    """Parameters of all the layers, stacked on axis 0; `__call__` takes one layer's slice."""
    self.norm = LayerNorm((model.num_layers, model.d_model), model.norm_epsilon)
    if model.attention_experts:
      self.attention = attention.MixtureOfAttention(model, layout, rngs=rngs)
    else:
      self.attention = attention.Attention(model, rngs=rngs)
    if model.ffn_experts:
      self.ffn = ffn.MixtureOfFFN(model, layout, rngs=rngs)
    else:
      self.ffn = ffn.FFN(model, rngs=rngs)
    self.layout = layout
    experts = model.attention_experts, model.ffn_experts
    self.scopes = ['group' if section else 'own' for section in experts]

  def __call__(self, x_BTD: jax.Array, tokens: dict[str, Tokens]) -> tuple[jax.Array, Routing]:
    """The residual stream after the block, and what its routers did.

    A mixture computes its experts' part for all the tokens of the group, a dense part all there is
    of this device's own.

    Args:
      x_BTD: the residual stream of this device's tokens, in the compute dtype.
      tokens: this device's 'own' and those of its 'group'.
    """
    y_BTD = {'own': self.norm(x_BTD)}
    if 'group' in self.scopes:
      # The residual stream travels, not the norm: it is in the compute dtype already, and routers
      # see the norm's float32 result whether or not there is a mesh.
      y_BTD['group'] = self.norm(self.layout.group(x_BTD))
    outputs, statistics = {'own': [], 'group': []}, []
    for part, scope in zip((self.attention, self.ffn), self.scopes):
      output_BTD, stats = part(y_BTD[scope], tokens[scope])
      outputs[scope].append(output_BTD)
      statistics.append(stats)
    if outputs['group']:
      outputs['own'].append(self.layout.to_owners(sum(outputs['group'])))
    added_BTD = self.layout.sum(sum(outputs['own']), 'tensor')
    return x_BTD + added_BTD, Routing(*statistics)
