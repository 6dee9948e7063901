"""Causal attention with rotary positions and grouped queries, dense and as a mixture of experts.

Legend: B batch, T and S sequence, D model, H query heads, G key-value heads, K head, E experts.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bam_jax import config
from bam_jax.model import parameters, remat, rope, router
from bam_jax.model.kernels import attention as kernels
from bam_jax.model.kernels import cached
from bam_jax.model.kernels.cached import KVCache
from bam_jax.model.norm import factor, layer_norm, new_scale, rms_norm
from bam_jax.model.rope import Tokens, apply_rope
from bam_jax.parallel.collectives import Layout


class Attention(nnx.Module):
  """Dense attention."""

  def __init__(self, model: config.Model, layout: Layout, *, rngs: nnx.Rngs):
    """Parameters of all the layers: `query` L[E]DHK, `key` and `value` L[E]DGK, `out` L[E]HKD.

    With experts `router` LDE too; with a norm of queries and keys `query_scale` L[E]HK and
    `key_scale` L[E]GK, or `query_shared_scale` and `key_shared_scale` L[E]K for all heads; biases
    `query_bias` L[E]HK, `key_bias` and `value_bias` L[E]GK, `out_bias` L[E]D.
    """
    L, D, K = model.num_layers, model.d_model, model.head_dim
    H, G = model.num_heads, model.num_kv_heads
    self.options = options = model.attention_experts
    self.model, self.layout, self.kinds = model, layout, rope.kinds(model)
    E = (options.num_experts,) if options else ()
    E_kv = () if options and options.shared_kv else E
    self.query = parameters.normal(rngs, (L, *E, D, H, K), D)
    self.key = parameters.normal(rngs, (L, *E_kv, D, G, K), D)
    self.value = parameters.normal(rngs, (L, *E_kv, D, G, K), D)
    self.out = parameters.normal(rngs, (L, *E, H, K, D), H * K, (2 * L) ** -0.5)
    if options:
      self.router = parameters.normal(rngs, (L, D, *E), D)
    if model.qk_norm == 'head_rms':
      self.query_shared_scale = new_scale(model, (L, *E, K))
      self.key_shared_scale = new_scale(model, (L, *E_kv, K))
    elif model.qk_norm != 'none':
      self.query_scale = new_scale(model, (L, *E, H, K))
      self.key_scale = new_scale(model, (L, *E_kv, G, K))
    if model.biases != 'none':
      self.query_bias = parameters.full((L, *E, H, K), 0)
      self.key_bias = parameters.full((L, *E_kv, G, K), 0)
      self.value_bias = parameters.full((L, *E_kv, G, K), 0)
    biased = model.biases in ('attention', 'all')
    self.out_bias = parameters.full((L, *E, D), 0) if biased else None

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
    output_BTD = jnp.einsum('bthk,hkd->btd', heads_BTHK, self.out[...])
    if self.out_bias is not None:
      output_BTD += self.layout.once(self.out_bias[...], 'tensor')
    return output_BTD, None, caches and [cache]

  def keys_and_values(self, y_BTD: jax.Array, expert, tokens: Tokens):
    """Rotated keys and values, both BTGK, of one expert; `...` stands for all there is."""
    key_BTGK = jnp.einsum('btd,dgk->btgk', y_BTD, self.key[expert])
    value_BTGK = jnp.einsum('btd,dgk->btgk', y_BTD, self.value[expert])
    if self.model.biases != 'none':
      key_BTGK, value_BTGK = key_BTGK + self.key_bias[expert], value_BTGK + self.value_bias[expert]
    key_BTGK = self.normalize_heads(key_BTGK, 'key', expert, self.model.num_kv_heads)
    key_BTGK = self.rotate(key_BTGK, tokens, expert)
    name = remat.KEY_VALUE
    return checkpoint_name(key_BTGK, name), checkpoint_name(value_BTGK, name)

  def heads(
    self, y_BTD: jax.Array, expert, key_BTGK, value_BTGK, tokens: Tokens, cache: KVCache | None
  ) -> jax.Array:
    """What the heads of one expert read from keys and values, BTHK."""
    model = self.model
    query_BTHK = jnp.einsum('btd,dhk->bthk', y_BTD, self.query[expert])
    if model.biases != 'none':
      query_BTHK += self.query_bias[expert]
    query_BTHK = self.normalize_heads(query_BTHK, 'query', expert, model.num_heads)
    query_BTHK = self.rotate(query_BTHK, tokens, expert)
    if model.attention_scale:  # kernels divide by the root of K
      query_BTHK *= jnp.asarray(model.attention_scale * model.head_dim**0.5, query_BTHK.dtype)
    query_BTHK = checkpoint_name(query_BTHK, remat.QUERY)

    def attend(window: int) -> jax.Array:
      cap = model.attention_cap
      if cache is not None:
        return cached.attention(query_BTHK, cache, tokens.first_B, tokens.start, window, cap)
      arrays = query_BTHK, key_BTGK, value_BTGK, tokens.segments_BT
      return kernels.attention(*arrays, self.layout.platform, window, cap)

    windows = [kind.window for kind in self.kinds]
    if len(set(windows)) == 1 or isinstance(tokens.kind, int):
      return attend(windows[tokens.kind if isinstance(tokens.kind, int) else 0])
    return jax.lax.switch(tokens.kind, [functools.partial(attend, window) for window in windows])

  def normalize_heads(self, x_BTHK: jax.Array, which: str, expert, num_heads: int) -> jax.Array:
    """The norm of `which`, 'query' or 'key', with `num_heads` heads on all devices together."""
    kind, epsilon = self.model.qk_norm, self.model.norm_epsilon
    if kind == 'none':
      return x_BTHK
    name = f'{which}_shared_scale' if kind == 'head_rms' else f'{which}_scale'
    scale = factor(self.model, getattr(self, name)[expert])
    if kind == 'all_rms':
      normed_BTHK = rms_norm_of_heads(self.layout, x_BTHK, scale, epsilon, num_heads)
    else:
      norm = layer_norm if kind == 'head_layernorm' else rms_norm
      normed_BTHK = norm(x_BTHK, scale, epsilon)
    return normed_BTHK.astype(x_BTHK.dtype)

  def rotate(self, x_BTHK: jax.Array, tokens: Tokens, expert) -> jax.Array:
    """RoPE of one expert's queries or keys."""
    number = None
    if self.options and self.options.ropes:
      number = self.layout.first_number(self.query.shape[0]) + expert
    if tokens.start is not None:
      # Else XLA for TPU rearranges the weights into pairs, in a copy, for the few rows of a decode.
      x_BTHK = jax.lax.optimization_barrier(x_BTHK)
    return apply_rope(x_BTHK, tokens, self.model.rotary_layout, number)


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
      if self.out_bias is not None:
        bias_D = self.layout.once(self.out_bias[expert], 'tensor')
        output_BTD += weights_BTE[:, :, expert, None] * bias_D
    choices = router.Choices(gates_BTE, logits_BTE, chosen_BTE, jnp.zeros((), jnp.int32))
    return output_BTD, choices, caches and updated


def rms_norm_of_heads(
  layout: Layout, x_BTHK: jax.Array, scale_HK: jax.Array, epsilon: float, num_heads: int
) -> jax.Array:
  """RMSNorm over all heads together, which `tensor` may cut; float32."""
  x_BTHK = x_BTHK.astype(jnp.promote_types(x_BTHK.dtype, jnp.float32))
  sum_BT11 = layout.sum(jnp.sum(x_BTHK**2, (-2, -1), keepdims=True), 'tensor')
  mean_BT11 = sum_BT11 / (num_heads * x_BTHK.shape[-1])
  return x_BTHK * jax.lax.rsqrt(mean_BT11 + epsilon) * scale_HK
