"""Rows of tokens to the experts they are assigned to, and back.

Each assignment of a token to an expert gets a slot: a row of the buffer that the experts work on.
The buffer has parts of equal length, each for one expert.

Legend: A assignments, S slots, D model, E experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Slots(NamedTuple):
  """Where every assignment goes. An index past the end stands for nowhere, and reads zeros."""

  slot_of_assignment: jax.Array  # (A,) int32, S for one that was dropped
  assignment_of_slot: jax.Array  # (S,) int32, A for a row that nothing fills
  expert_of_part: jax.Array  # (parts,) int32
  sizes: jax.Array  # (E,) int32, assignments to each expert


def blocks(experts_A: jax.Array, num_experts: int, rows: int) -> Slots:
  """Slots without drops: every expert gets as many parts of `rows` rows as it needs.

  There are floor((A + E (rows - 1)) / rows) parts, which suffice for any assignments: each expert
  leaves at most rows - 1 rows of its last part empty. Padding is assigned to expert `num_experts`.
  """
  order_A, rank_A, sizes_E = _sort(experts_A, num_experts)
  parts_E = -(-sizes_E // rows)
  ends_E = jnp.cumsum(parts_E)
  num_parts = (experts_A.size + num_experts * (rows - 1)) // rows
  expert_of_part = jnp.searchsorted(
    ends_E, jnp.arange(num_parts), side='right', method='compare_all'
  )
  first_row_E = rows * (ends_E - parts_E)
  sorted_A = experts_A[order_A]
  first_row_A = first_row_E.at[sorted_A].get(mode='clip')
  slots_A = jnp.where(sorted_A < num_experts, first_row_A + rank_A, num_parts * rows)
  expert_of_part = jnp.minimum(expert_of_part, num_experts - 1)
  return _slots(order_A, slots_A, num_parts * rows, expert_of_part, sizes_E)


def buffers(experts_A: jax.Array, num_experts: int, rows: int) -> Slots:
  """One part of `rows` rows for each expert; the assignments that come later are dropped."""
  order_A, rank_A, sizes_E = _sort(experts_A, num_experts)
  sorted_A = experts_A[order_A]
  kept_A = (sorted_A < num_experts) & (rank_A < rows)
  slots_A = jnp.where(kept_A, sorted_A * rows + rank_A, num_experts * rows)
  return _slots(order_A, slots_A, num_experts * rows, jnp.arange(num_experts), sizes_E)


def _sort(experts_A, num_experts):
  """Assignments in order of expert, the rank of each among its expert's, and the experts' sizes."""
  order_A = jnp.argsort(experts_A, stable=True)
  sizes_E = jnp.bincount(experts_A, length=num_experts + 1)[:num_experts]
  starts_E = jnp.cumsum(sizes_E) - sizes_E
  rank_A = jnp.arange(experts_A.size) - starts_E.at[experts_A[order_A]].get(mode='clip')
  return order_A, rank_A, sizes_E


def _slots(order_A, slots_A, num_slots, expert_of_part, sizes_E) -> Slots:
  A = order_A.size
  order_A, slots_A = order_A.astype(jnp.int32), slots_A.astype(jnp.int32)
  return Slots(
    slot_of_assignment=jnp.zeros(A, jnp.int32).at[order_A].set(slots_A),
    assignment_of_slot=jnp.full(num_slots, A, jnp.int32).at[slots_A].set(order_A, mode='drop'),
    expert_of_part=expert_of_part.astype(jnp.int32),
    sizes=sizes_E,
  )


def permute(x_AD: jax.Array, slots: Slots) -> jax.Array:
  """Rows of assignments in the buffer, (S, D); zeros where nothing fills a slot."""
  return _take(x_AD, slots.assignment_of_slot, slots.slot_of_assignment)


def unpermute(x_SD: jax.Array, slots: Slots) -> jax.Array:
  """Rows of the buffer in the order of assignments, (A, D); zeros for those that were dropped."""
  return _take(x_SD, slots.slot_of_assignment, slots.assignment_of_slot)


@jax.custom_vjp
def _take(rows: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
  """`rows[index]`, zeros where the index is past the end; `inverse[index[i]] == i`.

  With the inverse the gradient reads rows too; a scatter writes one row at a time on CPU and TPU.
  """
  return rows.at[index].get(mode='fill', fill_value=0)


def _take_forward(rows, index, inverse):
  return _take(rows, index, inverse), (index, inverse)


def _take_backward(residuals, cotangent):
  index, inverse = residuals
  no_gradient = np.zeros(index.shape, jax.dtypes.float0), np.zeros(inverse.shape, jax.dtypes.float0)
  return _take(cotangent, inverse, index), *no_gradient


_take.defvjp(_take_forward, _take_backward)
