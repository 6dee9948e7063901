"""The linear router: gates, the choice of experts, and the statistics that losses are made of.

Legend: B batch, T sequence, D model, E experts (the N of formulas), k experts a token visits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bam_jax import config
from bam_jax.model.rope import Tokens


class Assignments(NamedTuple):
  """What one router decided for each token; after the scan over layers with a leading axis L."""

  gates_BTE: jax.Array  # of all the experts, before the top-k
  logits_BTE: jax.Array
  chosen_BTE: jax.Array | None  # int32, 1 for the experts that the token visits; None: soft routing
  dropped: jax.Array  # (), int32: assignments that found their expert's buffer full

  @property
  def load_BTE(self) -> jax.Array:
    """The share of each token that went to each expert; with soft routing its gates."""
    if self.chosen_BTE is None:
      return self.gates_BTE
    return self.chosen_BTE / self.chosen_BTE.sum(-1, keepdims=True)


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


def gates(
  model: config.Model, y_BTD: jax.Array, router_DE: jax.Array, tokens: Tokens, sum_BE=None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Softmax gates over all the experts and their logits, BTE, float32 whatever `y_BTD` is.

  With router_input='prefix' it reads the mean of each token's document so far; it is linear, so
  this is a mean of E logits. `sum_BE`, float32, is what an earlier call returned last for the
  tokens before these of the same documents; by default there are none.
  """
  dtype = jnp.promote_types(y_BTD.dtype, jnp.float32)
  logits_BTE = jnp.einsum(
    'btd,de->bte', y_BTD.astype(dtype), router_DE, precision=jax.lax.Precision.HIGHEST
  )
  if model.router_input == 'prefix':
    logits_BTE, sum_BE = prefix_mean(logits_BTE, tokens, model.router_memory, sum_BE)
  return jax.nn.softmax(logits_BTE), logits_BTE, sum_BE


def prefix_mean(
  x_BTE: jax.Array, tokens: Tokens, memory: int = 0, sum_BE: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """The mean of `x` over each token's document up to and including it, and the sums at the end.

  With a memory of m tokens the one n before has the weight (1 - 1/m)^n. A segmented scan: a
  difference of cumulative sums would cancel. Padding counts for nothing.
  """
  real_BT1, positions_BT1 = tokens.real_BT[..., None], tokens.positions_BT[..., None]
  x_BTE = jnp.where(real_BT1, x_BTE, 0)
  kept_BT1 = jnp.where(positions_BT1 == 0, 0, 1 - 1 / memory if memory else 1.0)
  kept_BT1 = jnp.where(real_BT1, kept_BT1, 1).astype(x_BTE.dtype)

  def add(earlier, later):
    (kept_earlier, sum_earlier), (kept_later, sum_later) = earlier, later
    return kept_earlier * kept_later, kept_later * sum_earlier + sum_later

  kept_BT1, sums_BTE = jax.lax.associative_scan(add, (kept_BT1, x_BTE), axis=1)
  if sum_BE is not None:
    sums_BTE += kept_BT1 * sum_BE[:, None]
  count_BT1 = (positions_BT1 + 1).astype(x_BTE.dtype)
  if memory:  # the sum of the weights
    count_BT1 = -memory * jnp.expm1(count_BT1 * jnp.log1p(-1 / memory))
  return sums_BTE / count_BT1, sums_BTE[:, -1]


def top_k(
  gates_BTE: jax.Array, k: int, renormalize: bool, bias_E: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The experts that each token visits: the k largest gates; ties go to the lower number.

  A bias decides who is chosen and no more: the gates that are returned do not have it, and it has
  no gradient; arXiv 2408.15664, eq. 3. `renormalize` divides the k gates by their sum.

  Returns:
    Gates (B, T, k), expert numbers (B, T, k) int32, and a 0/1 mask of them (B, T, E) int32.
  """
  if bias_E is None:
    gates_BTk, experts_BTk = jax.lax.top_k(gates_BTE, k)
  else:
    _, experts_BTk = jax.lax.top_k(jax.lax.stop_gradient(gates_BTE + bias_E), k)
    gates_BTk = jnp.take_along_axis(gates_BTE, experts_BTk, axis=-1)
  if renormalize:
    gates_BTk = gates_BTk / gates_BTk.sum(-1, keepdims=True)
  chosen_BTE = jax.nn.one_hot(experts_BTk, gates_BTE.shape[-1], dtype=jnp.int32).sum(-2)
  return gates_BTk, experts_BTk, chosen_BTE


def statistics(assignments: Assignments, counted_BT: jax.Array) -> Statistics:
  """Sums over the tokens that the bool `counted_BT` marks; padding counts for nothing."""
  gates_BTE, logits_BTE, chosen_BTE, dropped = assignments
  counted = counted_BT.astype(gates_BTE.dtype)
  gate_E = jnp.einsum('bte,bt->e', gates_BTE, counted)
  if chosen_BTE is None:
    load_E = jax.lax.stop_gradient(gate_E)
  else:
    load_E = jnp.sum(jnp.where(counted_BT[..., None], chosen_BTE, 0), (0, 1), jnp.int32)
  entropy_BT = -jnp.sum(gates_BTE * jax.nn.log_softmax(logits_BTE), axis=-1)
  return Statistics(
    tokens=jnp.sum(counted_BT, dtype=jnp.int32),
    load=load_E,
    gate=gate_E,
    z=jnp.sum(jax.nn.logsumexp(logits_BTE, axis=-1) ** 2 * counted),
    entropy=jax.lax.stop_gradient(jnp.sum(entropy_BT * counted)),
    dropped=dropped,
  )


def load_balance(stats: Statistics, whole: Statistics) -> jax.Array:
  """`L_LB = N sum_i f_i P_i`, summed over layers; Switch Transformers, arXiv 2101.03961.

  The contribution of `stats`'s tokens to the loss over all tokens of `whole`, which include them.
  """
  tokens = jnp.maximum(whole.tokens, 1)[..., None]
  shares = whole.load / jnp.maximum(whole.load.sum(-1, keepdims=True), 1)
  return stats.load.shape[-1] * jnp.sum(shares * (stats.gate / tokens))


def router_z(stats: Statistics, whole: Statistics) -> jax.Array:
  """`L_z`, the mean of logsumexp(logits)^2, summed over layers as there; arXiv 2202.08906."""
  return jnp.sum(stats.z / jnp.maximum(whole.tokens, 1))
