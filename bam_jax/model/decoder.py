"""The model as a reader of new tokens after those that a cache holds: prompts, or one at a time.

It is the training model's own block; what differs is the layout of the weights, the attention to a
cache and the experts' kernel. Rows end together: shorter ones have padding in front, so that the
new token of every row has the same slot.

Legend: B batch, T new tokens, S slots, D model, V vocabulary, W words of this device.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bam_jax import config
from bam_jax.model import attention, block, norm, resident, transformer, vocabulary
from bam_jax.model import cache as cache_lib
from bam_jax.model.kernels import cached, visited
from bam_jax.model.tokens import Tokens


class Decoder:
  """A model as a function of resident parameters and a cache.

  On a mesh `read` is a device's part, to be called inside `layout.spread`.
  """

  def __init__(
    self, model: config.Model, dtype: str, mesh: jax.sharding.Mesh | None = None, platform: str = ''
  ):
    """Decides all about shapes.

    Args:
      model: any variant; its experts drop nothing, whatever it was trained with.
      dtype: of weights, activations and cache.
      mesh: default: one device.
      platform: whose kernels; default: the mesh's.
    """
    if model.ffn_experts:
      experts = dataclasses.replace(model.ffn_experts, capacity_factor=0.0)
      model = dataclasses.replace(model, ffn_experts=experts)
    self.model = model
    self.dtype = dtype
    self.layout = resident.Resident(mesh, platform)
    self.abstract = transformer.Network(model, config.Compute()).abstract()
    self._graph, _ = nnx.split(nnx.eval_shape(self._block))

  def _block(self) -> block.Block:
    made = block.Block(self.model, self.layout, rngs=nnx.Rngs(params=0))
    if self.model.ffn_experts:
      made.ffn.experts = visited.choose(self.layout.platform, made.ffn.experts)
    return made

  def place(self, read) -> dict[str, Any]:
    """Parameters on the devices; see `resident.place`."""
    return resident.place(read, self.abstract, self.layout, self.dtype)

  def read(
    self, params: dict, cache: cache_lib.Cache, tokens_BT: jax.Array, first_B: jax.Array, start
  ) -> tuple[jax.Array, cache_lib.Cache]:
    """Reads new tokens, which take the slots from `start` on.

    Args:
      params: what `place` returned.
      cache: of all tokens before.
      tokens_BT: int32.
      first_B: int32, the slot of each row's first token; what stands before it is padding.
      start: int32.

    Returns:
      Scores of the token that follows the last one (B, V), float32, the same on all devices of a
      row, and the cache with the new tokens.
    """
    length = tokens_BT.shape[1]
    positions_BT = start + jnp.arange(length) - first_B[:, None]
    real_BT = positions_BT >= 0
    rotate = attention.rotary(
      jnp.maximum(positions_BT, 0), self.model.head_dim, self.model.rope_theta, self.dtype
    )
    # Or else XLA for TPU makes the pairs of the weights, in a copy, for the few rows there are.
    turn = lambda x_BTHK: rotate(jax.lax.optimization_barrier(x_BTHK))
    attend = cached.attention(first_B, start, length)
    x_BTD = vocabulary.embed(self.layout, params['embed']['table'], tokens_BT, self.dtype)
    written = []
    # Not a scan: it would copy each layer's slice of the weights, and of the cache, before use.
    for weights, sets in zip(params['blocks'], cache):
      memory = cache_lib.Memory(sets, start)
      tokens = Tokens(turn, attend, real_BT, real_BT, memory.remember)
      x_BTD, _ = nnx.merge(self._graph, weights)(x_BTD, {'own': tokens, 'group': tokens})
      written.append(memory.sets)
    scale = params['final_norm']['scale']
    hidden_BD = norm.layer_norm(x_BTD[:, -1], scale, self.model.norm_epsilon)
    return self._scores(params, hidden_BD), written

  def _scores(self, params: dict, hidden_BD: jax.Array) -> jax.Array:
    tied = self.model.tied_embeddings
    logits_BW = self.model.logit_scale * jnp.einsum(
      'bd,wd->bw' if tied else 'bd,dw->bw',
      hidden_BD.astype(self.dtype),
      params['embed']['table'] if tied else params['unembed']['kernel'],
      preferred_element_type=jnp.promote_types(self.dtype, jnp.float32),
    )
    return self.layout.join(logits_BW, 'tensor', 'expert', dimension=1)
