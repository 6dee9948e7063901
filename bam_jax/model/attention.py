"""Causal attention with rotary positions and grouped queries, dense and as a mixture of experts.

Legend: B batch, T and S sequence, D model, H query heads, G key-value heads, K head, E experts.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bam_jax import config
from bam_jax.model import parameters, remat, router
from bam_jax.model.kernels import attention as kernels
from bam_jax.model.kernels import cached
from bam_jax.model.kernels.cached import KVCache
from bam_jax.model.norm import layer_norm
from bam_jax.model.rope import Tokens, apply_rope
from bam_jax.parallel.collectives import Layout


class Attention(nnx.Module):
  """Dense attention."""

  def __init__(self, model: config.Model, layout: Layout, *, rngs: nnx.Rngs):
    """Parameters of all the layers: `query` L[E]DHK, `key` and `value` L[E]DGK, `out` L[E]HKD.

    With experts `router` LDE too, with norms of heads `query_scale` L[E]HK and `key_scale` L[E]GK.
    """
    L, D, K = model.num_layers, model.d_model, model.head_dim
    H, G = model.num_heads, model.num_kv_heads
    self.options = options = model.attention_experts
    self.layout = layout
    self.qk_norm, self.epsilon = model.qk_norm, model.norm_epsilon
    E = (options.num_experts,) if options else ()
    E_kv = () if options and options.shared_kv else E
    self.query = parameters.normal(rngs, (L, *E, D, H, K), D)
    self.key = parameters.normal(rngs, (L, *E_kv, D, G, K), D)
    self.value = parameters.normal(rngs, (L, *E_kv, D, G, K), D)
    self.out = parameters.normal(rngs, (L, *E, H, K, D), H * K, (2 * L) ** -0.5)
    if options:
      self.router = parameters.normal(rngs, (L, D, *E), D)
    if model.qk_norm:
      self.query_scale = parameters.full((L, *E, H, K), 1)
      self.key_scale = parameters.full((L, *E_kv, G, K), 1)

  def __call__(
    self, y_BTD: jax.Array, tokens: Tokens, caches: Sequence[KVCache] | None = None
  ) -> tuple[jax.Array, router.Choices | None, list[KVCache] | None]:
    """One layer's attention of normalised tokens (B, T, D).

    Given `caches` of earlier tokens, one for each set of keys and values on this device, it is to
    these too. Returns (B, T, D), the router's choices, and the caches with these tokens in them.
    """
    y_BTD = y_BTD.astype(self.query.dtype)
    key, value = self.keys_and_values(y_BTD, ..., tokens)
    cache = caches[0].update(key, value, tokens.start) if caches else None
    heads_BTHK = self.heads(y_BTD, ..., key, value, tokens, cache)
    return jnp.einsum('bthk,hkd->btd', heads_BTHK, self.out[...]), None, caches and [cache]

  def keys_and_values(self, y_BTD: jax.Array, expert, tokens: Tokens):
    """Rotated keys and values, both BTGK, of one expert; `...` stands for all there is."""
    key_BTGK = jnp.einsum('btd,dgk->btgk', y_BTD, self.key[expert])
    if self.qk_norm:
      key_BTGK = self.head_norm(key_BTGK, self.key_scale[expert])
    key_BTGK = _rotate(key_BTGK, tokens)
    value_BTGK = jnp.einsum('btd,dgk->btgk', y_BTD, self.value[expert])
    name = remat.KEY_VALUE
    return checkpoint_name(key_BTGK, name), checkpoint_name(value_BTGK, name)

  def heads(
    self, y_BTD: jax.Array, expert, key_BTGK, value_BTGK, tokens: Tokens, cache: KVCache | None
  ) -> jax.Array:
    """What the heads of one expert read from keys and values, BTHK."""
    query_BTHK = jnp.einsum('btd,dhk->bthk', y_BTD, self.query[expert])
    if self.qk_norm:
      query_BTHK = self.head_norm(query_BTHK, self.query_scale[expert])
    query_BTHK = checkpoint_name(_rotate(query_BTHK, tokens), remat.QUERY)
    if cache is not None:
      return cached.attention(query_BTHK, cache, tokens.first_B, tokens.start)
    platform = self.layout.platform
    return kernels.attention(query_BTHK, key_BTGK, value_BTGK, tokens.segments_BT, platform)

  def head_norm(self, x_BTHK: jax.Array, scale_HK: jax.Array) -> jax.Array:
    """Layer normalisation of each head."""
    return layer_norm(x_BTHK, scale_HK, self.epsilon).astype(x_BTHK.dtype)


class MixtureOfAttention(Attention):
  """`sum_j g_j MHA_j(y)` with the gates of the query's token; paper section 3."""

  def __call__(self, y_BTD, tokens, caches=None):
    """What `Attention` returns, as far as the experts on this device go."""
    gates_BTE, logits_BTE = router.gates(y_BTD, self.router[...])
    weights_BTE, chosen_BTE = gates_BTE, None  # soft routing: every token visits every expert
    if self.options.top_k:
      gates_BTk, experts_BTk, chosen_BTE = router.top_k(
        gates_BTE, self.options.top_k, self.options.renormalize
      )
      one_hot_BTkE = jax.nn.one_hot(experts_BTk, gates_BTE.shape[-1])
      weights_BTE = jnp.einsum('btk,btke->bte', gates_BTk, one_hot_BTkE)

    num_experts, shared_kv = self.query.shape[0], self.options.shared_kv
    y_BTD = y_BTD.astype(self.query.dtype)
    weights_BTE = self.layout.local_columns(weights_BTE, num_experts).astype(y_BTD.dtype)
    output_BTD, updated, cache = 0, [], None
    # A loop is the fastest form on CPU (folding the experts into the batch costs 6%, vmap 34%) and
    # leaves every expert a plain attention that a kernel can take.
    for expert in range(num_experts):
      if expert == 0 or not shared_kv:
        key, value = self.keys_and_values(y_BTD, ... if shared_kv else expert, tokens)
        if caches:
          cache = caches[expert].update(key, value, tokens.start)
          updated.append(cache)
      heads_BTHK = self.heads(y_BTD, expert, key, value, tokens, cache)
      heads_BTHK = heads_BTHK * weights_BTE[:, :, expert, None, None]
      output_BTD += jnp.einsum('bthk,hkd->btd', heads_BTHK, self.out[expert])
    choices = router.Choices(gates_BTE, logits_BTE, chosen_BTE, jnp.zeros((), jnp.int32))
    return output_BTD, choices, caches and updated


def _rotate(x_BTHK: jax.Array, tokens: Tokens) -> jax.Array:
  if tokens.start is not None:
    # Else XLA for TPU rearranges the weights into pairs, in a copy, for the few rows of a decode.
    x_BTHK = jax.lax.optimization_barrier(x_BTHK)
  return apply_rope(x_BTHK, tokens)
