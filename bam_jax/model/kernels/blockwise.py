"""Causal attention for CPUs, a block of queries at a time; FlashAttention-2, arXiv 2307.08691.

A block of queries meets only the keys up to its own end, so that little more than half of the
scores are computed; the backward pass recomputes them from the logsumexp, and nothing of size T x T
is kept. The loop over blocks is unrolled: their shapes differ, and all are static.

Legend: B batch, T queries, S keys, H query heads, G key-value heads, R = H / G, K head, t a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bam_jax.model import activation, remat

BLOCK = 128  # queries; their scores stay in a core's cache
MAX_BLOCKS = 8  # so that long sequences compile fast


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attention(
  query_BTHK, key_BSGK, value_BSGK, segments_BT, window: int = 0, cap: float = 0.0
) -> jax.Array:
  """What `kernels.attention.attention` computes."""
  return _forward(query_BTHK, key_BSGK, value_BSGK, segments_BT, window, cap)[0]


def _forward(query_BTHK, key_BSGK, value_BSGK, segments_BT, window, cap):
  query_BGRTK, key_BGSK, value_BGSK = _arrange(query_BTHK, key_BSGK, value_BSGK)
  outputs, logsumexps = [], []
  for start, end, first in _blocks(query_BTHK.shape[1], window):
    scores_BGRtS = _scores(query_BGRTK, key_BGSK, segments_BT, start, end, first, window, cap)
    largest_BGRt1 = scores_BGRtS.max(-1, keepdims=True)
    weights_BGRtS = jnp.exp(scores_BGRtS - largest_BGRt1)
    total_BGRt1 = weights_BGRtS.sum(-1, keepdims=True)
    output_BGRtK = _dot('bgrts,bgsk->bgrtk', weights_BGRtS, value_BGSK[:, :, first:end])
    outputs.append((output_BGRtK / total_BGRt1).astype(value_BSGK.dtype))
    logsumexps.append(largest_BGRt1 + jnp.log(total_BGRt1))
  output_BGRTK = checkpoint_name(jnp.concatenate(outputs, 3), remat.HEADS)
  logsumexp_BGRT1 = checkpoint_name(jnp.concatenate(logsumexps, 3), remat.HEADS)
  saved = query_BTHK, key_BSGK, value_BSGK, segments_BT, output_BGRTK, logsumexp_BGRT1
  return _tokens_first(output_BGRTK), saved


def _backward(window, cap, saved, cotangent_BTHK):
  query_BTHK, key_BSGK, value_BSGK, segments_BT, output_BGRTK, logsumexp_BGRT1 = saved
  query_BGRTK, key_BGSK, value_BGSK = _arrange(query_BTHK, key_BSGK, value_BSGK)
  cotangent_BGRTK = _heads_first(cotangent_BTHK, key_BSGK.shape[2])
  dtype = logsumexp_BGRT1.dtype
  # The softmax's gradient needs the sum over keys of weight times cotangent: this, for all at once.
  common_BGRT1 = jnp.sum(output_BGRTK.astype(dtype) * cotangent_BGRTK, -1, keepdims=True)
  d_queries = []
  d_key_BGSK = jnp.zeros(key_BGSK.shape, dtype)
  d_value_BGSK = jnp.zeros(value_BGSK.shape, dtype)
  for start, end, first in _blocks(query_BTHK.shape[1], window):
    part = (slice(None),) * 3 + (slice(start, end),)
    seen = (slice(None),) * 2 + (slice(first, end),)
    scores_BGRtS = _scores(query_BGRTK, key_BGSK, segments_BT, start, end, first, window, cap)
    weights_BGRtS = jnp.exp(scores_BGRtS - logsumexp_BGRT1[part])
    d_value_BGSK = d_value_BGSK.at[seen].add(
      _dot('bgrts,bgrtk->bgsk', weights_BGRtS, cotangent_BGRTK[part])
    )
    d_scores_BGRtS = _dot('bgrtk,bgsk->bgrts', cotangent_BGRTK[part], value_BGSK[seen])
    d_scores_BGRtS = weights_BGRtS * (d_scores_BGRtS - common_BGRT1[part])
    if cap:
      d_scores_BGRtS *= activation.derivative(scores_BGRtS, cap)
    d_queries.append(_dot('bgrts,bgsk->bgrtk', d_scores_BGRtS, key_BGSK[seen]))
    d_key_BGSK = d_key_BGSK.at[seen].add(
      _dot('bgrts,bgrtk->bgsk', d_scores_BGRtS, query_BGRTK[part])
    )
  d_query_BGRTK = jnp.concatenate(d_queries, 3) * query_BTHK.shape[-1] ** -0.5
  return (
    _tokens_first(d_query_BGRTK).astype(query_BTHK.dtype),
    d_key_BGSK.swapaxes(1, 2).astype(key_BSGK.dtype),
    d_value_BGSK.swapaxes(1, 2).astype(value_BSGK.dtype),
    None,
  )


attention.defvjp(_forward, _backward)


def _blocks(length: int, window: int) -> list[tuple[int, int, int]]:
  """Of each block of queries the start and end, and the first key that one of them sees."""
  size = max(BLOCK, -(-length // MAX_BLOCKS))
  first = lambda start: max(start - window + 1, 0) if window else 0
  return [(start, min(start + size, length), first(start)) for start in range(0, length, size)]


def _scores(
  query_BGRTK, key_BGSK, segments_BT, start: int, end: int, first: int, window: int, cap: float
):
  """Scores of the queries from `start` to `end` with the keys from `first` to `end`, float32."""
  seen = slice(first, end)
  scores_BGRtS = _dot('bgrtk,bgsk->bgrts', query_BGRTK[:, :, :, start:end], key_BGSK[:, :, seen])
  scores_BGRtS = activation.capped(scores_BGRtS, cap)
  same_BtS = segments_BT[:, start:end, None] == segments_BT[:, None, seen]
  query_t1, key_S = jnp.arange(start, end)[:, None], jnp.arange(first, end)
  visible_BtS = (key_S <= query_t1) & same_BtS
  if window:
    visible_BtS &= key_S > query_t1 - window
  return jnp.where(visible_BtS[:, None, None], scores_BGRtS, jnp.finfo(scores_BGRtS.dtype).min)


def _dot(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
  """An einsum in the right operand's dtype, summed in float32."""
  dtype = jnp.promote_types(right.dtype, jnp.float32)
  return jnp.einsum(spec, left.astype(right.dtype), right, preferred_element_type=dtype)


def _arrange(query_BTHK, key_BSGK, value_BSGK):
  """Query BGRTK over the root of K, key and value BGSK."""
  scale = query_BTHK.shape[-1] ** -0.5
  query_BGRTK = _heads_first(query_BTHK * scale, key_BSGK.shape[2])
  return query_BGRTK, key_BSGK.swapaxes(1, 2), value_BSGK.swapaxes(1, 2)


def _heads_first(x_BTHK: jax.Array, groups: int) -> jax.Array:
  B, T, H, K = x_BTHK.shape
  return x_BTHK.reshape(B, T, groups, H // groups, K).transpose(0, 2, 3, 1, 4)


def _tokens_first(x_BGRTK: jax.Array) -> jax.Array:
  B, G, R, T, K = x_BGRTK.shape
  return x_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, K)
