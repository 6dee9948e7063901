"""Causal attention of new tokens to all that a cache holds of their row.

Legend: B batch, T new tokens, S slots of the cache, G key-value heads, R queries of each, K head.
"""

import jax
import jax.numpy as jnp

from bam_jax.model.kernels.attention import Attend

MOST_SCORES = 2**18  # of one head that exist at once
BLOCK = 512  # slots, at most, where those would be more


def attention(first_B: jax.Array, start: jax.Array, length: int) -> Attend:
  """The function (query BTHK, key BGSK, value BGSK) -> BTHK; scores and softmax in float32.

  Args:
    first_B: int32, the slot of each row's first token; what lies before it is padding.
    start: int32, the slot of the first of the new tokens.
    length: T.
  """
  own_T = start + jnp.arange(length)

  def scores_of(query_BTGRK, key_BGSK, from_slot):
    dtype = jnp.promote_types(query_BTGRK.dtype, jnp.float32)
    scores_BGRTS = jnp.einsum(
      'btgrk,bgsk->bgrts', query_BTGRK, key_BGSK, preferred_element_type=dtype
    )
    slot_S = from_slot + jnp.arange(key_BGSK.shape[2])
    visible_BTS = (slot_S <= own_T[:, None]) & (slot_S >= first_B[:, None, None])
    return jnp.where(visible_BTS[:, None, None], scores_BGRTS, jnp.finfo(dtype).min)

  def at_once(query_BTGRK, key_BGSK, value_BGSK):
    weights_BGRTS = jax.nn.softmax(scores_of(query_BTGRK, key_BGSK, 0)).astype(value_BGSK.dtype)
    return jnp.einsum('bgrts,bgsk->bgrtk', weights_BGRTS, value_BGSK)

  def in_blocks(query_BTGRK, key_BGSK, value_BGSK):
    """Online softmax over blocks of slots, none of them past the new tokens; arXiv 2205.14135."""
    S = key_BGSK.shape[2]
    block = min(BLOCK, S & -S)  # a power of 2 that divides S: a slot seen twice would count twice
    B, T, G, R, K = query_BTGRK.shape

    def step(number, carry):
      largest_BGRT, total_BGRT, sum_BGRTK = carry
      key_BGsK, value_BGsK = (
        jax.lax.dynamic_slice_in_dim(x, number * block, block, axis=2)
        for x in (key_BGSK, value_BGSK)
      )
      scores_BGRTs = scores_of(query_BTGRK, key_BGsK, number * block)
      new_BGRT = jnp.maximum(largest_BGRT, scores_BGRTs.max(-1))
      weights_BGRTs = jnp.exp(scores_BGRTs - new_BGRT[..., None])
      kept_BGRT = jnp.exp(largest_BGRT - new_BGRT)
      part_BGRTK = jnp.einsum(
        'bgrts,bgsk->bgrtk',
        weights_BGRTs.astype(value_BGsK.dtype),
        value_BGsK,
        preferred_element_type=sum_BGRTK.dtype,
      )
      total_BGRT = total_BGRT * kept_BGRT + weights_BGRTs.sum(-1)
      return new_BGRT, total_BGRT, sum_BGRTK * kept_BGRT[..., None] + part_BGRTK

    dtype = jnp.promote_types(query_BTGRK.dtype, jnp.float32)
    carry = (
      jnp.full((B, G, R, T), jnp.finfo(dtype).min, dtype),
      jnp.zeros((B, G, R, T), dtype),
      jnp.zeros((B, G, R, T, K), dtype),
    )
    blocks = -(-(start + length) // block)
    _, total_BGRT, sum_BGRTK = jax.lax.fori_loop(0, blocks, step, carry)
    return sum_BGRTK / total_BGRT[..., None]

  def attend(query_BTHK, key_BGSK, value_BGSK):
    B, T, H, K = query_BTHK.shape
    G, S = key_BGSK.shape[1:3]
    query_BTGRK = query_BTHK.reshape(B, T, G, H // G, K) * K**-0.5
    run = at_once if T * S <= MOST_SCORES else in_blocks
    heads_BGRTK = run(query_BTGRK, key_BGSK, value_BGSK)
    return heads_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K).astype(query_BTHK.dtype)

  return attend
