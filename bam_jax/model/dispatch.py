"""Rows of tokens to the experts that they chose, and back.

A pair is one token's one choice; P = tokens * k of them. Each pair gets a slot, a row of the buffer
that the experts work on: a whole number of equal parts, every part the property of one expert.

Legend: P pairs, S slots, D model, E experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Slots(NamedTuple):
  """Where every pair goes. An index past the end stands for none, and reads zeros."""

  slot_of_pair: jax.Array  # (P,) int32, S for a pair that was dropped
  pair_of_slot: jax.Array  # (S,) int32, P for a row that nobody fills
  expert_of_part: jax.Array  # (parts,) int32
  sizes: jax.Array  # (E,) int32, pairs that chose each expert


def blocks(experts_P: jax.Array, num_experts: int, rows: int) -> Slots:
  """Dropless: every expert gets as many parts of `rows` rows as it needs.

  Args:
    experts_P: the expert of each pair; `num_experts` for a pair that wants none (padding).
    num_experts: E.
    rows: of a part. Their number, floor((P + E (rows - 1)) / rows), suffices whatever the choices
      are: each expert leaves at most rows - 1 rows of its last part empty.
  """
  order_P, rank_P, sizes_E = _group(experts_P, num_experts)
  parts_E = -(-sizes_E // rows)
  ends_E = jnp.cumsum(parts_E)
  num_parts = (experts_P.size + num_experts * (rows - 1)) // rows
  expert_of_part = jnp.searchsorted(
    ends_E, jnp.arange(num_parts), side='right', method='compare_all'
  )
  first_row_E = rows * (ends_E - parts_E)
  sorted_P = experts_P[order_P]
  slots_P = jnp.where(
    sorted_P < num_experts,
    first_row_E.at[sorted_P].get(mode='clip') + rank_P,
    num_parts * rows,
  )
  return _slots(
    order_P, slots_P, num_parts * rows, jnp.minimum(expert_of_part, num_experts - 1), sizes_E
  )


def buffers(experts_P: jax.Array, num_experts: int, rows: int) -> Slots:
  """One part of `rows` rows for each expert; the pairs that come later are dropped."""
  order_P, rank_P, sizes_E = _group(experts_P, num_experts)
  sorted_P = experts_P[order_P]
  kept_P = (sorted_P < num_experts) & (rank_P < rows)
  slots_P = jnp.where(kept_P, sorted_P * rows + rank_P, num_experts * rows)
  return _slots(order_P, slots_P, num_experts * rows, jnp.arange(num_experts), sizes_E)


def _group(experts_P, num_experts):
  """Pairs in order of expert, the rank of each among its expert's, and the experts' sizes."""
  order_P = jnp.argsort(experts_P, stable=True)
  sizes_E = jnp.bincount(experts_P, length=num_experts + 1)[:num_experts]
  starts_E = jnp.cumsum(sizes_E) - sizes_E
  rank_P = jnp.arange(experts_P.size) - starts_E.at[experts_P[order_P]].get(mode='clip')
  return order_P, rank_P, sizes_E


def _slots(order_P, slots_P, num_slots, expert_of_part, sizes_E) -> Slots:
  num_pairs = order_P.size
  return Slots(
    slot_of_pair=jnp.zeros(num_pairs, jnp.int32).at[order_P].set(slots_P.astype(jnp.int32)),
    pair_of_slot=jnp.full(num_slots, num_pairs, jnp.int32)
    .at[slots_P]
    .set(order_P.astype(jnp.int32), mode='drop'),
    expert_of_part=expert_of_part.astype(jnp.int32),
    sizes=sizes_E,
  )


@jax.custom_vjp
def move(rows: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
  """`rows[index]`, zeros where the index is past the end.

  Args:
    rows: (M, D).
    index: (M',) int32, no row named twice.
    inverse: (M,) int32, `inverse[index[i]] == i`, past the end for a row that nobody reads. With it
      the gradient is a read as well, not a scatter, which CPUs and TPUs run one row at a time.
  """
  return rows.at[index].get(mode='fill', fill_value=0)


def _move_forward(rows, index, inverse):
  return move(rows, index, inverse), (index, inverse)


def _move_backward(residuals, cotangent):
  index, inverse = residuals
  no_gradient = np.zeros(index.shape, jax.dtypes.float0), np.zeros(inverse.shape, jax.dtypes.float0)
  return move(cotangent, inverse, index), *no_gradient


move.defvjp(_move_forward, _move_backward)
