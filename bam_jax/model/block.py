"""The parallel block of every variant: `y = norm(x); x + attention(y) + ffn(y)`."""

from typing import NamedTuple

import jax
from flax import nnx

from bam_jax import config
from bam_jax.model.attention import Attention, MixtureOfAttention
from bam_jax.model.ffn import FFN, MixtureOfFFN
from bam_jax.model.norm import LayerNorm
from bam_jax.model.rope import Tokens
from bam_jax.model.router import Choices, Statistics
from bam_jax.parallel.collectives import Layout


class Routing(NamedTuple):
  """Of the two routers; None where the model has no such router."""

  attention: Choices | Statistics | None
  ffn: Choices | Statistics | None


class Block(nnx.Module):
  """One norm, then attention and FFN side by side, each of them dense or a mixture of experts.

  An `expert` group is the devices that share one set of experts. Each device computes dense parts
  for its own tokens, and its experts' parts for the tokens of the whole group: these are gathered
  once, and the sum of what the experts made is reduced once, to the tokens' owners.
  """

  def __init__(
    self, model: config.Model, layout: Layout, decoding: bool = False, *, rngs: nnx.Rngs
  ):
    """Parameters of all the layers, stacked on axis 0; `__call__` takes one layer's slice.

    `decoding` says that few tokens come at a time, so that reading weights takes the time.
    """
    self.layout = layout
    self.attention_experts, self.ffn_experts = model.attention_experts, model.ffn_experts
    self.norm = LayerNorm((model.num_layers, model.d_model), model.norm_epsilon)
    if model.attention_experts:
      self.attention = MixtureOfAttention(model, layout, rngs=rngs)
    else:
      self.attention = Attention(model, layout, rngs=rngs)
    if model.ffn_experts:
      self.ffn = MixtureOfFFN(model, layout, decoding, rngs=rngs)
    else:
      self.ffn = FFN(model, rngs=rngs)

  def __call__(
    self, x_BTD: jax.Array, tokens: Tokens, group: Tokens, caches: list | None = None
  ) -> tuple[jax.Array, Routing, list | None]:
    """One layer.

    Args:
      x_BTD: the residual stream of this device's tokens, in the compute dtype.
      tokens: their metadata.
      group: that of all tokens of the `expert` group.
      caches: of earlier tokens; see `Attention`.

    Returns:
      The residual stream, what the routers chose for the group's tokens, and the caches.
    """
    # x is gathered, not norm(x): it is in the compute dtype already, and so routers see the norm's
    # float32 result whether or not there is a mesh.
    gather, reduce = self.layout.gather_tokens, self.layout.reduce_tokens
    if not self.attention_experts and not self.ffn_experts:  # dense
      y_BTD = self.norm(x_BTD)
      attended_BTD, attention_choices, caches = self.attention(y_BTD, tokens, caches)
      fed_BTD, ffn_choices = self.ffn(y_BTD, tokens)
      added_BTD = attended_BTD + fed_BTD
    elif self.attention_experts and self.ffn_experts:  # BAM: gather once, reduce once
      y_BTD = self.norm(gather(x_BTD))
      attended_BTD, attention_choices, caches = self.attention(y_BTD, group, caches)
      fed_BTD, ffn_choices = self.ffn(y_BTD, group)
      added_BTD = reduce(attended_BTD + fed_BTD)
    elif self.ffn_experts:  # BTX
      attended_BTD, attention_choices, caches = self.attention(self.norm(x_BTD), tokens, caches)
      fed_BTD, ffn_choices = self.ffn(self.norm(gather(x_BTD)), group)
      added_BTD = attended_BTD + reduce(fed_BTD)
    else:  # a mixture of attention alone
      y_BTD = self.norm(gather(x_BTD))
      attended_BTD, attention_choices, caches = self.attention(y_BTD, group, caches)
      fed_BTD, ffn_choices = self.ffn(self.norm(x_BTD), tokens)
      added_BTD = fed_BTD + reduce(attended_BTD)
    x_BTD = x_BTD + self.layout.sum(added_BTD, 'tensor')
    return x_BTD, Routing(attention_choices, ffn_choices), caches
