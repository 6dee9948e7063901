"""Causal attention with rotary positions and grouped queries, dense and as a mixture of experts.

Legend: B batch, T and S sequence, D model, H query heads, G key-value heads, K head, E experts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bam_jax import config
from bam_jax.model import norm, parameters, remat, router
from bam_jax.model.tokens import Tokens
from bam_jax.parallel.collectives import Layout


def rotary(positions_BT: jax.Array, head_dim: int, theta: float, dtype: jnp.dtype) -> Callable:
  """Rotary position embedding of interleaved pairs over the whole head; arXiv 2104.09864, eq. 34.

  Returns:
    The function that turns (B, T, heads, K) to the given positions; it computes in float32.
  """
  dtype = jnp.promote_types(dtype, jnp.float32)
  frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim)
  angles = positions_BT[:, :, None, None].astype(dtype) * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)

  def turn(x_BTHK):
    pairs = x_BTHK.reshape(*x_BTHK.shape[:-1], head_dim // 2, 2).astype(dtype)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x_BTHK.shape).astype(x_BTHK.dtype)

  return turn


class Attention(nnx.Module):
  """Dense attention."""

  def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
    """Parameters of all the layers: `query` LDHK, `key` and `value` LDGK, `out` LHKD.

    With norms of heads, `query_scale` LHK and `key_scale` LGK too.
    """
    L, D, H, G, K = _sizes(model)
    self.query = parameters.normal(rngs, (L, D, H, K), D)
    self.key = parameters.normal(rngs, (L, D, G, K), D)
    self.value = parameters.normal(rngs, (L, D, G, K), D)
    self.out = parameters.normal(rngs, (L, H, K, D), H * K, (2 * L) ** -0.5)
    self.turns = _turns(model)
    if model.qk_norm:
      self.query_scale = parameters.ones((L, H, K))
      self.key_scale = parameters.ones((L, G, K))

  def __call__(self, y_BTD: jax.Array, tokens: Tokens) -> tuple[jax.Array, None]:
    """One layer's attention of normalised tokens (B, T, D), and no statistics."""
    y_BTD = y_BTD.astype(self.query.dtype)
    turn_query, turn_key = self.turns(self, ..., ..., tokens.turn)
    key, value = tokens.remember(*_key_value(y_BTD, self.key[...], self.value[...], turn_key))
    heads_BTHK = _heads(y_BTD, self.query[...], key, value, turn_query, tokens.attend)
    return jnp.einsum('bthk,hkd->btd', heads_BTHK, self.out[...]), None


class MixtureOfAttention(nnx.Module):
  """`sum_j g_j MHA_j(y)` with the gates of the query's token; paper section 3."""

  def __init__(self, model: config.Model, layout: Layout, *, rngs: nnx.Rngs):
    """Parameters of all the layers: `query` LEDHK, `key` and `value` L[E]DGK, `out` LEHKD.

    With norms of heads, `query_scale` LEHK and `key_scale` L[E]GK too.
    """
    L, D, H, G, K = _sizes(model)
    self.options = model.attention_experts
    self.layout = layout
    E = self.options.num_experts
    key_value = (L, D, G, K) if self.options.shared_kv else (L, E, D, G, K)
    self.query = parameters.normal(rngs, (L, E, D, H, K), D)
    self.key = parameters.normal(rngs, key_value, D)
    self.value = parameters.normal(rngs, key_value, D)
    self.out = parameters.normal(rngs, (L, E, H, K, D), H * K, (2 * L) ** -0.5)
    self.router = parameters.normal(rngs, (L, D, E), D)
    self.statistics = router.statistics  # what is reported; an observer puts its own here
    self.turns = _turns(model)
    if model.qk_norm:
      self.query_scale = parameters.ones((L, E, H, K))
      self.key_scale = parameters.ones((*key_value[:-3], G, K))

  def __call__(self, y_BTD: jax.Array, tokens: Tokens) -> tuple[jax.Array, router.Statistics]:
    """One layer's mixture of normalised tokens (B, T, D), as far as this device's experts go."""
    gates_BTE, logits_BTE = router.gates(y_BTD, self.router[...])
    mixed_BTE, chosen_BTE = gates_BTE, None
    if self.options.top_k:
      gates_BTk, experts_BTk, chosen_BTE = router.choose(
        gates_BTE, self.options.top_k, self.options.renormalize
      )
      mixed_BTE = jnp.einsum(
        'btk,btke->bte', gates_BTk, jax.nn.one_hot(experts_BTk, gates_BTE.shape[-1])
      )
    stats = self.statistics(gates_BTE, logits_BTE, chosen_BTE, tokens.counted_BT)

    num_experts = self.query.shape[0]
    y_BTD = y_BTD.astype(self.query.dtype)
    mixed_BTE = self.layout.my_experts(mixed_BTE, num_experts).astype(self.query.dtype)
    output_BTD = 0
    # A loop is the fastest form on CPU (folding the experts into the batch costs 6%, vmap 34%) and
    # leaves every expert a plain attention that a kernel can take.
    for expert in range(num_experts):
      which = ... if self.options.shared_kv else expert
      turn_query, turn_key = self.turns(self, expert, which, tokens.turn)
      if expert == 0 or not self.options.shared_kv:
        key, value = tokens.remember(
          *_key_value(y_BTD, self.key[which], self.value[which], turn_key)
        )
      heads_BTHK = _heads(y_BTD, self.query[expert], key, value, turn_query, tokens.attend)
      heads_BTHK = heads_BTHK * mixed_BTE[:, :, expert, None, None]
      output_BTD += jnp.einsum('bthk,hkd->btd', heads_BTHK, self.out[expert])
    return output_BTD, stats


def _turns(model: config.Model) -> Callable:
  """What queries and keys undergo before they meet: a rotation, and first a norm if they have one.

  Returns:
    The function (module, its query's index, its key's index, turn) -> functions of queries, keys.
  """
  if not model.qk_norm:
    return lambda module, query, key, turn: (turn, turn)

  def after_norm(scale, turn):
    return lambda x: turn(norm.layer_norm(x, scale, model.norm_epsilon).astype(x.dtype))

  def turns(module, query, key, turn):
    query_scale_HK, key_scale_GK = module.query_scale[query], module.key_scale[key]
    return after_norm(query_scale_HK, turn), after_norm(key_scale_GK, turn)

  return turns


def _key_value(y_BTD, key_DGK, value_DGK, turn):
  key_BTGK = turn(jnp.einsum('btd,dgk->btgk', y_BTD, key_DGK))
  value_BTGK = jnp.einsum('btd,dgk->btgk', y_BTD, value_DGK)
  return checkpoint_name(key_BTGK, remat.KEY_VALUE), checkpoint_name(value_BTGK, remat.KEY_VALUE)


def _heads(y_BTD, query_DHK, key_BTGK, value_BTGK, turn, attend):
  query_BTHK = turn(jnp.einsum('btd,dhk->bthk', y_BTD, query_DHK))
  return attend(checkpoint_name(query_BTHK, remat.QUERY), key_BTGK, value_BTGK)


def _sizes(model: config.Model) -> tuple[int, int, int, int, int]:
  return model.num_layers, model.d_model, model.num_heads, model.num_kv_heads, model.head_dim
