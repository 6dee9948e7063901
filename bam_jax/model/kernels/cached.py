"""The KV cache of a decoder, and attention of new tokens to what it holds of their row.

Heads stand before slots: with one query a head, each head's scores are then a product with a
matrix that is contiguous.

Legend: X parts along the mesh's `expert` axis, one on each device; B batch, T new tokens, S slots,
G key-value heads, H = G R query heads, K head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from bam_jax.model import activation

MAX_SCORES = 2**18  # of one head that exist at once
BLOCK = 512  # slots, at most, where there would be more
IN_ORDER = Layout(major_to_minor=tuple(range(5)))  # of XBGSK


class KVCache(NamedTuple):
  """One layer's keys and values so far, those of one attention expert or of all."""

  key: jax.Array  # XBGSK
  value: jax.Array  # XBGSK

  def update(self, key_BTGK: jax.Array, value_BTGK: jax.Array, start: jax.Array) -> 'KVCache':
    """The cache with new tokens from slot `start` on, the same slots in every row."""

    def write(old_XBGSK, new_BTGK):
      new_XBGTK = new_BTGK.swapaxes(1, 2)[None].astype(old_XBGSK.dtype)
      new_XBGSK = jax.lax.dynamic_update_slice_in_dim(old_XBGSK, new_XBGTK, start, axis=3)
      # Else XLA for TPU copies it all into another layout before a loop over tokens, and back.
      new_XBGSK = with_layout_constraint(new_XBGSK, IN_ORDER)
      # Else XLA writes once more for the matmul that reads it, and into a copy.
      return jax.lax.optimization_barrier(new_XBGSK)

    return KVCache(write(self.key, key_BTGK), write(self.value, value_BTGK))


class LayerCache(NamedTuple):
  """What one layer keeps of a row's earlier tokens."""

  keys_values: list[KVCache]  # of all attention experts, or of each on this device
  # Where routers read the prefix, the sums of their logits over the row so far: BE, float32.
  attention_sum: jax.Array | None = None
  ffn_sum: jax.Array | None = None


def attention(
  query_BTHK: jax.Array,
  cache: KVCache,
  first_B: jax.Array,
  start: jax.Array,
  window: int = 0,
  cap: float = 0.0,
) -> jax.Array:
  """Causal attention to a cache that holds the new tokens already; scores and softmax in float32.

  `first_B` are the slots of rows' first tokens, behind padding; `start` is the first new token's.
  A token sees at most `window` tokens, itself included; 0: all before it. `cap` is of the scores.
  """
  B, T, H, K = query_BTHK.shape
  key_BGSK, value_BGSK = cache.key[0], cache.value[0]
  G, S = key_BGSK.shape[1:3]
  query_BTGRK = query_BTHK.reshape(B, T, G, H // G, K) * K**-0.5
  if T * S <= MAX_SCORES:
    scores_BGRTS = _scores(query_BTGRK, key_BGSK, 0, first_B, start, window, cap)
    weights_BGRTS = jax.nn.softmax(scores_BGRTS).astype(value_BGSK.dtype)
    heads_BGRTK = jnp.einsum('bgrts,bgsk->bgrtk', weights_BGRTS, value_BGSK)
  else:
    heads_BGRTK = _in_blocks(query_BTGRK, key_BGSK, value_BGSK, first_B, start, window, cap)
  return heads_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K).astype(query_BTHK.dtype)


def _scores(query_BTGRK, key_BGSK, first_slot, first_B, start, window, cap) -> jax.Array:
  """Scores BGRTS, float32, with keys whose slots begin at `first_slot`."""
  dtype = jnp.promote_types(query_BTGRK.dtype, jnp.float32)
  scores_BGRTS = jnp.einsum(
    'btgrk,bgsk->bgrts', query_BTGRK, key_BGSK, preferred_element_type=dtype
  )
  scores_BGRTS = activation.capped(scores_BGRTS, cap)
  query_slot_T = start + jnp.arange(query_BTGRK.shape[1])
  slot_S = first_slot + jnp.arange(key_BGSK.shape[2])
  visible_BTS = (slot_S <= query_slot_T[:, None]) & (slot_S >= first_B[:, None, None])
  if window:
    visible_BTS &= slot_S > query_slot_T[:, None] - window
  return jnp.where(visible_BTS[:, None, None], scores_BGRTS, jnp.finfo(dtype).min)


def _in_blocks(query_BTGRK, key_BGSK, value_BGSK, first_B, start, window, cap) -> jax.Array:
  """Online softmax over the blocks of slots that a new token may see; arXiv 2205.14135."""
  B, T, G, R, K = query_BTGRK.shape
  S = key_BGSK.shape[2]
  block = min(BLOCK, S & -S)  # a power of 2 that divides S: a slot seen twice would count twice
  dtype = jnp.promote_types(query_BTGRK.dtype, jnp.float32)

  def step(number, carry):
    largest_BGRT, total_BGRT, sum_BGRTK = carry
    key_BGsK, value_BGsK = (
      jax.lax.dynamic_slice_in_dim(x, number * block, block, axis=2) for x in (key_BGSK, value_BGSK)
    )
    scores_BGRTs = _scores(query_BTGRK, key_BGsK, number * block, first_B, start, window, cap)
    new_BGRT = jnp.maximum(largest_BGRT, scores_BGRTs.max(-1))
    weights_BGRTs = jnp.exp(scores_BGRTs - new_BGRT[..., None])
    kept_BGRT = jnp.exp(largest_BGRT - new_BGRT)
    part_BGRTK = jnp.einsum(
      'bgrts,bgsk->bgrtk',
      weights_BGRTs.astype(value_BGsK.dtype),
      value_BGsK,
      preferred_element_type=dtype,
    )
    total_BGRT = total_BGRT * kept_BGRT + weights_BGRTs.sum(-1)
    return new_BGRT, total_BGRT, sum_BGRTK * kept_BGRT[..., None] + part_BGRTK

  carry = (
    jnp.full((B, G, R, T), jnp.finfo(dtype).min, dtype),
    jnp.zeros((B, G, R, T), dtype),
    jnp.zeros((B, G, R, T, K), dtype),
  )
  first = jnp.maximum(start - window + 1, 0) // block if window else 0
  _, total_BGRT, sum_BGRTK = jax.lax.fori_loop(first, -(-(start + T) // block), step, carry)
  return sum_BGRTK / total_BGRT[..., None]
