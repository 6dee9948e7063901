"""Causal attention with rotary positions and grouped queries, dense and as a mixture of experts.

Legend: B batch, T and S sequence, D model, H query heads, G key-value heads, K head, E experts.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bam_jax import config
from bam_jax.model import parameters, remat, rope, router
from bam_jax.model.kernels import attention as kernels
from bam_jax.model.kernels import cached, projection
from bam_jax.model.kernels.cached import KVCache, LayerCache
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
    self, y_BTD: jax.Array, tokens: Tokens, cache: LayerCache | None = None
  ) -> tuple[jax.Array, router.Assignments | None, LayerCache | None]:
    """One layer's attention of normalised tokens (B, T, D), and of those in a cache.

    Returns (B, T, D), the router's assignments, and the cache with these tokens in it.
    """
    y_BTD = y_BTD.astype(self.query.dtype)
    key, value = self.keys_and_values(y_BTD, ..., tokens)
    held = cache and cache.keys_values[0].update(key, value, tokens.start)
    heads_BTHK = self.heads(self.queries(y_BTD, ...), ..., key, value, tokens, held)
    output_BTD = jnp.einsum('bthk,hkd->btd', heads_BTHK, self.out[...])
    if self.out_bias is not None:
      output_BTD += self.layout.once(self.out_bias[...], 'tensor')
    return output_BTD, None, cache and cache._replace(keys_values=[held])

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

  def queries(self, y_BTD: jax.Array, expert) -> jax.Array:
    """Queries of one expert, BTHK, normalised and not rotated."""
    query_BTHK = jnp.einsum('btd,dhk->bthk', y_BTD, self.query[expert])
    if self.model.biases != 'none':
      query_BTHK += self.query_bias[expert]
    return self.normalize_heads(query_BTHK, 'query', expert, self.model.num_heads)

  def heads(
    self, query_BTHK: jax.Array, expert, key_BTGK, value_BTGK, tokens: Tokens, cache: KVCache | None
  ) -> jax.Array:
    """What the heads of one expert, or more of them with its keys, read from these: BTHK."""
    model = self.model
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
    if self.model.qk_norm == 'none':
      return x_BTHK
    return self.scaled_heads(x_BTHK, self.head_scales(which)[expert], num_heads)

  def head_scales(self, which: str) -> jax.Array:
    """The parameter of the norm of `which`: [E]HK, or [E]K for all heads."""
    name = f'{which}_shared_scale' if self.model.qk_norm == 'head_rms' else f'{which}_scale'
    return getattr(self, name)

  def scaled_heads(self, x_BTHK: jax.Array, scale, num_heads: int) -> jax.Array:
    """The norm of queries or keys with these parameters, which broadcast to HK."""
    kind, epsilon = self.model.qk_norm, self.model.norm_epsilon
    scale = factor(self.model, scale)
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
      num_experts = self.options.num_experts
      number = self.layout.first_number(self.query.shape[0], num_experts) + expert
    if tokens.start is not None:
      # Else XLA for TPU rearranges the weights into pairs, in a copy, for the few rows of a decode.
      x_BTHK = jax.lax.optimization_barrier(x_BTHK)
    return apply_rope(x_BTHK, tokens, self.model.rotary_layout, number)


class MixtureOfAttention(Attention):
  """`sum_j g_j MHA_j(y)` with the gates of the query's token; paper section 3."""

  def __call__(self, y_BTD, tokens, cache=None):
    """What `Attention` returns, as far as the experts on this device go."""
    gates_BTE, logits_BTE, sum_BE = router.gates(
      self.model, y_BTD, self.router[...], tokens, cache and cache.attention_sum
    )
    y_BTD = y_BTD.astype(self.query.dtype)
    if self.options.top_k:
      top_k, renormalize = self.options.top_k, self.options.renormalize
      gates_BTk, experts_BTk, chosen_BTE = router.top_k(gates_BTE, top_k, renormalize)
      output_BTD, held = self.routed(y_BTD, gates_BTk, experts_BTk, tokens, cache)
    else:  # soft routing: every token visits every expert
      chosen_BTE = None
      output_BTD, held = self.soft(y_BTD, gates_BTE, tokens, cache)
    assignments = router.Assignments(gates_BTE, logits_BTE, chosen_BTE, jnp.zeros((), jnp.int32))
    return output_BTD, assignments, cache and LayerCache(held, sum_BE, cache.ffn_sum)

  def soft(
    self, y_BTD, gates_BTE, tokens: Tokens, cache: LayerCache | None
  ) -> tuple[jax.Array, list[KVCache]]:
    """Every expert's attention times its gate, (B, T, D), and the caches."""
    num_experts, output_BTD, updated = self.query.shape[0], 0, []
    gates_BTE = self.layout.local_columns(gates_BTE, num_experts).astype(y_BTD.dtype)
    # A loop is the fastest form on CPU (folding the experts into the batch costs 6%, vmap 34%) and
    # leaves every expert a plain attention that a kernel can take.
    for expert in range(num_experts):
      if expert == 0 or not self.options.shared_kv:
        key, value, held = self.held_keys_and_values(y_BTD, expert, tokens, cache)
        updated.append(held)
      queries = self.queries(y_BTD, expert)
      heads_BTHK = self.heads(queries, expert, key, value, tokens, held)
      heads_BTHK = heads_BTHK * gates_BTE[:, :, expert, None, None]
      output_BTD += jnp.einsum('bthk,hkd->btd', heads_BTHK, self.out[expert])
      if self.out_bias is not None:
        bias_D = self.layout.once(self.out_bias[expert], 'tensor')
        output_BTD += gates_BTE[:, :, expert, None] * bias_D
    return output_BTD, updated

  def routed(
    self, y_BTD, gates_BTk, experts_BTk, tokens: Tokens, cache: LayerCache | None
  ) -> tuple[jax.Array, list[KVCache]]:
    """The attention of the k experts that each token chose, times their gates, and the caches.

    Queries and outputs are computed for these experts alone. Keys and values are computed for all
    tokens, since a later token may choose any expert.
    """
    num_experts, platform = self.query.shape[0], self.layout.platform
    B, T, k = experts_BTk.shape
    experts_BTk = self.layout.local_numbers(experts_BTk, num_experts, self.options.num_experts)
    experts_BTk = jnp.where(tokens.real_BT[..., None], experts_BTk, num_experts)
    slots = projection.slots(experts_BTk.reshape(-1), num_experts, platform)
    y_AD = jnp.repeat(y_BTD.reshape(B * T, -1), k, axis=0)
    query_AX = projection.project(y_AD, self.query[...], slots, platform, bool(cache))
    query_BTkHK = query_AX.reshape(B, T, k, -1, self.model.head_dim)

    def chosen(x_EX) -> jax.Array:
      """What belongs to each token's experts, BTkX."""
      stacked_EX = jnp.stack([x_EX[expert] for expert in range(num_experts)])
      one_hot_BTkE = jax.nn.one_hot(experts_BTk, num_experts, dtype=stacked_EX.dtype)
      return jnp.tensordot(one_hot_BTkE, stacked_EX, 1)

    if self.model.biases != 'none':
      query_BTkHK += chosen(self.query_bias)
    if self.model.qk_norm != 'none':
      scales = chosen(self.head_scales('query'))
      scales = scales[..., None, :] if self.model.qk_norm == 'head_rms' else scales
      query_BTkHK = self.scaled_heads(query_BTkHK, scales, self.model.num_heads)

    if self.options.shared_kv:
      key, value, held = self.held_keys_and_values(y_BTD, 0, tokens, cache)
      # The heads of all k experts that read the same keys stand side by side.
      G = key.shape[2]
      grouped_BTGkRK = query_BTkHK.reshape(B, T, k, G, -1, self.model.head_dim).swapaxes(2, 3)
      query_BTHK = grouped_BTGkRK.reshape(B, T, -1, self.model.head_dim)
      heads_BTHK = self.heads(query_BTHK, ..., key, value, tokens, held)
      heads_BTkHK, updated = heads_BTHK.reshape(grouped_BTGkRK.shape).swapaxes(2, 3), [held]
    else:
      heads_BTkHK, updated = 0, []
      for expert in range(num_experts):
        key, value, held = self.held_keys_and_values(y_BTD, expert, tokens, cache)
        updated.append(held)
        mine_BTk11 = (experts_BTk == expert)[..., None, None]
        query_BTHK = jnp.where(mine_BTk11, query_BTkHK, 0).sum(2)
        heads_BTHK = self.heads(query_BTHK, expert, key, value, tokens, held)
        heads_BTkHK += jnp.where(mine_BTk11, heads_BTHK[:, :, None], 0)

    heads_AX = heads_BTkHK.reshape(query_AX.shape)
    output_AD = projection.project(heads_AX, self.out[...], slots, platform, bool(cache))
    output_BTkD = output_AD.reshape(B, T, k, -1)  # zeros for experts on other devices
    if self.out_bias is not None:
      output_BTkD += self.layout.once(chosen(self.out_bias), 'tensor')
    return jnp.einsum('btkd,btk->btd', output_BTkD, gates_BTk.astype(y_BTD.dtype)), updated

  def held_keys_and_values(self, y_BTD, expert: int, tokens: Tokens, cache: LayerCache | None):
    """Keys and values of one expert, or the shared ones, BTGK, and the cache with them in it."""
    number = 0 if self.options.shared_kv else expert
    key, value = self.keys_and_values(y_BTD, ... if self.options.shared_kv else expert, tokens)
    held = cache and cache.keys_values[number].update(key, value, tokens.start)
    return key, value, held


def rms_norm_of_heads(
  layout: Layout, x_BTHK: jax.Array, scale_HK: jax.Array, epsilon: float, num_heads: int
) -> jax.Array:
  """RMSNorm over all heads together, which `tensor` may cut; float32."""
  x_BTHK = x_BTHK.astype(jnp.promote_types(x_BTHK.dtype, jnp.float32))
  sum_BT11 = layout.sum(jnp.sum(x_BTHK**2, (-2, -1), keepdims=True), 'tensor')
  mean_BT11 = sum_BT11 / (num_heads * x_BTHK.shape[-1])
  return x_BTHK * jax.lax.rsqrt(mean_BT11 + epsilon) * scale_HK
