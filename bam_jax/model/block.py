"""One layer: `y = norm(x); x + attention(y) + ffn(y)`, or attention and FFN one after the other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bam_jax import config
from bam_jax.model.attention import Attention, MixtureOfAttention
from bam_jax.model.ffn import FFN, MixtureOfFFN
from bam_jax.model.kernels.cached import LayerCache
from bam_jax.model.norm import Norm
from bam_jax.model.rope import Tokens
from bam_jax.model.router import Assignments, Statistics
from bam_jax.parallel.collectives import Layout


class Routing(NamedTuple):
  """Of the two routers, None where the model has no such router; or what the two parts read."""

  attention: Assignments | Statistics | jax.Array | None
  ffn: Assignments | Statistics | jax.Array | None


class Block(nnx.Module):
  """Attention and FFN, each of them dense or a mixture of experts, and their norms.

  An `expert` group is the devices that share one set of experts. Each device computes dense parts
  for its own tokens, and its experts' parts for the tokens of the whole group: these are gathered,
  and the sum of what the experts made is reduced to the tokens' owners. A parallel block does both
  once, a sequential one for each part.

  Routed attention counts as dense in training: its tokens stay, and its experts' weights are
  gathered. Elsewhere most scores of a token would be of experts that it did not choose.
  """

  def __init__(
    self, model: config.Model, layout: Layout, decoding: bool = False, *, rngs: nnx.Rngs
  ):
    """Parameters of all the layers, stacked on axis 0; `__call__` takes one layer's slice.

    `decoding` says that few tokens come at a time, so that reading weights takes the time.
    """
    self.model, self.layout = model, layout
    # Whether tokens go to the attention experts. A decoder's few do, whatever chooses the experts.
    self.gathers_attention = model.soft_attention or decoding and bool(model.attention_experts)
    norm = lambda name: (
      Norm((model.num_layers, model.d_model), model) if name in model.norms else None
    )
    self.norm, self.attention_out_norm = norm('norm'), norm('attention_out_norm')
    self.ffn_norm, self.ffn_out_norm = norm('ffn_norm'), norm('ffn_out_norm')
    if model.attention_experts:
      self.attention = MixtureOfAttention(model, layout, rngs=rngs)
    else:
      self.attention = Attention(model, layout, rngs=rngs)
    ffn = MixtureOfFFN if model.ffn_experts else FFN
    self.ffn = ffn(model, layout, decoding, rngs=rngs)

  def __call__(
    self,
    x_BTD: jax.Array,
    tokens: Tokens,
    gathered: Tokens,
    cache: LayerCache | None = None,
    keep_inputs: bool = False,
  ) -> tuple[jax.Array, Routing, LayerCache | None]:
    """One layer.

    Args:
      x_BTD: the residual stream of this device's tokens, in the compute dtype.
      tokens: their metadata.
      gathered: that of all tokens of the `expert` group.
      cache: of earlier tokens.
      keep_inputs: return what the parts of a dense or sequential block read, BTD, not assignments.

    Returns:
      The residual stream, what routers chose for the tokens that experts read here, and the cache.
    """
    if self.model.block == 'sequential':
      return self.sequential(x_BTD, tokens, gathered, cache, keep_inputs)
    # x is gathered, not norm(x): it is in the compute dtype already, and so routers see the norm's
    # float32 result whether or not there is a mesh.
    gather, reduce = self.layout.gather_tokens, self.layout.reduce_tokens
    gathers_attention, ffn_experts = self.gathers_attention, self.model.ffn_experts
    norm, ffn_norm = self.norm, self.ffn_norm or self.norm
    if not gathers_attention and not ffn_experts:  # dense
      z_BTD = norm(x_BTD)
      y_BTD = ffn_norm(x_BTD) if self.ffn_norm else z_BTD
      attended_BTD, attention_routing, cache = self.attention(z_BTD, tokens, cache)
      fed_BTD, ffn_routing, cache = self.ffn(y_BTD, tokens, cache)
      added_BTD = attended_BTD + fed_BTD
      if keep_inputs:
        attention_routing, ffn_routing = z_BTD, y_BTD
    elif gathers_attention and ffn_experts:  # BAM: gather once, reduce once
      all_BTD = gather(x_BTD)
      z_BTD = norm(all_BTD)
      y_BTD = ffn_norm(all_BTD) if self.ffn_norm else z_BTD
      attended_BTD, attention_routing, cache = self.attention(z_BTD, gathered, cache)
      fed_BTD, ffn_routing, cache = self.ffn(y_BTD, gathered, cache)
      added_BTD = reduce(attended_BTD + fed_BTD)
    elif ffn_experts:  # BTX, and BAM with routed attention
      attended_BTD, attention_routing, cache = self.attention(norm(x_BTD), tokens, cache)
      fed_BTD, ffn_routing, cache = self.ffn(ffn_norm(gather(x_BTD)), gathered, cache)
      added_BTD = attended_BTD + reduce(fed_BTD)
    else:  # a soft mixture of attention alone
      attended_BTD, attention_routing, cache = self.attention(norm(gather(x_BTD)), gathered, cache)
      fed_BTD, ffn_routing, cache = self.ffn(ffn_norm(x_BTD), tokens, cache)
      added_BTD = fed_BTD + reduce(attended_BTD)
    x_BTD = x_BTD + self.scaled(self.layout.sum(added_BTD, 'tensor'))
    return x_BTD, Routing(attention_routing, ffn_routing), cache

  def sequential(self, x_BTD, tokens: Tokens, gathered: Tokens, cache, keep_inputs):
    """`x' = x + attention(norm(x)); x' + ffn(ffn_norm(x'))`, or with norms on the sums too."""
    experts = self.gathers_attention
    z_BTD, here = self.inputs(x_BTD, tokens, gathered, experts, self.norm)
    attended_BTD, attention_routing, cache = self.attention(z_BTD, here, cache)
    x_BTD += self.outputs(attended_BTD, experts, self.attention_out_norm)
    experts = self.model.ffn_experts
    y_BTD, here = self.inputs(x_BTD, tokens, gathered, experts, self.ffn_norm)
    fed_BTD, ffn_routing, cache = self.ffn(y_BTD, here, cache)
    x_BTD += self.outputs(fed_BTD, experts, self.ffn_out_norm)
    routing = (z_BTD, y_BTD) if keep_inputs else (attention_routing, ffn_routing)
    return x_BTD, Routing(*routing), cache

  def inputs(self, x_BTD, tokens: Tokens, gathered: Tokens, experts, norm: Norm | None):
    """What a part reads, of the whole group if it has experts, and the metadata of these tokens."""
    if experts:
      x_BTD, tokens = self.layout.gather_tokens(x_BTD), gathered
    return norm(x_BTD) if norm else x_BTD, tokens

  def outputs(self, y_BTD, experts, norm: Norm | None) -> jax.Array:
    """What a part adds to the residual stream of this device's tokens."""
    y_BTD = self.layout.reduce_tokens(y_BTD) if experts else y_BTD
    y_BTD = self.layout.sum(y_BTD, 'tensor')
    y_BTD = norm(y_BTD).astype(y_BTD.dtype) if norm else y_BTD  # of the experts' sum
    return self.scaled(y_BTD)

  def scaled(self, y_BTD: jax.Array) -> jax.Array:
    """An output, times the factor of all parts."""
    return y_BTD * jnp.asarray(self.model.residual_scale, y_BTD.dtype)
