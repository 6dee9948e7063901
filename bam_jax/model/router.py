"""The linear router, its gates, and what its losses and its pictures need to know.

Legend: B batch, T sequence, D model, E experts (the N of formulas), k experts a token visits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Statistics(NamedTuple):
  """Sums over the real tokens of a batch; adding two batches' gives those of their union.

  Counts are int32, and therefore exact whatever the batch; all else is float32. After the scan over
  layers each has a leading axis L.
  """

  tokens: jax.Array  # (), int32: real tokens
  load: jax.Array  # (E,): assignments to each expert, int32; where routing is soft, `gate`
  gate: jax.Array  # (E,): gates before the top-k
  z: jax.Array  # (): logsumexp(logits)^2
  entropy: jax.Array  # (): entropy of the gates before the top-k, nats
  dropped: jax.Array  # (), int32: assignments that found their expert's buffer full


def gates(y_BTD: jax.Array, router_DE: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Softmax gates over all the experts, in float32 whatever `y_BTD` is.

  Returns:
    Gates and logits, both (B, T, E).
  """
  dtype = jnp.promote_types(y_BTD.dtype, jnp.float32)
  logits_BTE = jnp.einsum(
    'btd,de->bte', y_BTD.astype(dtype), router_DE, precision=jax.lax.Precision.HIGHEST
  )
  return jax.nn.softmax(logits_BTE), logits_BTE


def choose(
  gates_BTE: jax.Array, top_k: int, renormalize: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The k largest gates of each token; ties go to the lower expert.

  Returns:
    Gates (B, T, k), expert numbers (B, T, k) int32, and the choices as a 0/1 mask (B, T, E) int32.
  """
  return _chosen(gates_BTE, *jax.lax.top_k(gates_BTE, top_k), renormalize)


def choose_biased(
  gates_BTE: jax.Array, bias_E: jax.Array, top_k: int, renormalize: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What `choose` returns, for the k largest sums of gate and bias; arXiv 2408.15664, eq. 3.

  The bias decides who is chosen and no more: the gates are without it, and it has no gradient.
  """
  _, experts_BTk = jax.lax.top_k(jax.lax.stop_gradient(gates_BTE + bias_E), top_k)
  gates_BTk = jnp.take_along_axis(gates_BTE, experts_BTk, axis=-1)
  return _chosen(gates_BTE, gates_BTk, experts_BTk, renormalize)


def _chosen(gates_BTE, gates_BTk, experts_BTk, renormalize):
  if renormalize:
    gates_BTk = gates_BTk / gates_BTk.sum(-1, keepdims=True)
  chosen_BTE = jax.nn.one_hot(experts_BTk, gates_BTE.shape[-1], dtype=jnp.int32).sum(-2)
  return gates_BTk, experts_BTk, chosen_BTE


def statistics(
  gates_BTE: jax.Array,
  logits_BTE: jax.Array,
  chosen_BTE: jax.Array | None,
  real_BT: jax.Array,
) -> Statistics:
  """Statistics over the tokens that `real_BT` marks; padding counts for nothing.

  Args:
    gates_BTE: what `gates` returned.
    logits_BTE: likewise.
    chosen_BTE: the int32 mask that `choose` returned; None where routing is soft.
    real_BT: bool.
  """
  real = real_BT.astype(gates_BTE.dtype)
  gate_E = jnp.einsum('bte,bt->e', gates_BTE, real)
  if chosen_BTE is None:
    load_E = jax.lax.stop_gradient(gate_E)
  else:
    load_E = jnp.sum(jnp.where(real_BT[..., None], chosen_BTE, 0), (0, 1), jnp.int32)

  def total(x_BT):
    return jnp.sum(x_BT * real)

  return Statistics(
    tokens=jnp.sum(real_BT, dtype=jnp.int32),
    load=load_E,
    gate=gate_E,
    z=total(jax.nn.logsumexp(logits_BTE, axis=-1) ** 2),
    entropy=jax.lax.stop_gradient(
      total(-jnp.sum(gates_BTE * jax.nn.log_softmax(logits_BTE), axis=-1))
    ),
    dropped=jnp.zeros((), jnp.int32),
  )


def load_shares(stats: Statistics) -> jax.Array:
  """The share of the assignments that each expert got; zeros where there was none."""
  return stats.load / jnp.maximum(stats.load.sum(-1, keepdims=True), 1)


def load_balance(stats: Statistics, whole: Statistics) -> jax.Array:
  """`L_LB = N sum_i f_i P_i`, summed over layers; Switch Transformers, arXiv 2101.03961.

  Args:
    stats: of some tokens; what they contribute.
    whole: of all the tokens that the loss is over; equal to `stats` if those are all.
  """
  tokens = jnp.maximum(whole.tokens, 1)[..., None]
  num_experts = stats.load.shape[-1]
  return num_experts * jnp.sum(load_shares(whole) * (stats.gate / tokens))


def router_z(stats: Statistics, whole: Statistics) -> jax.Array:
  """`L_z`, the mean of logsumexp(logits)^2, summed over layers; ST-MoE, arXiv 2202.08906.

  Arguments are as `load_balance` has them.
  """
  return jnp.sum(stats.z / jnp.maximum(whole.tokens, 1))
