"""Experts' FFN where the weights are what takes time: an expert without a token is not read.

Legend: P pairs of a token and a choice, S rows sorted by expert, R rows of a block, E experts,
D model, F hidden.
"""

import jax
import jax.numpy as jnp

from bam_jax.model import dispatch
from bam_jax.model.ffn import swiglu

BLOCK_ROWS = 64  # that meet an expert's weights at once


def experts(x_PD: jax.Array, experts_P: jax.Array, weights) -> tuple[jax.Array, jax.Array]:
  """`(silu(x W_gate) * (x W_up)) W_down` of each pair's expert.

  Every expert has a loop of its own over its rows, which reads its weights where they lie; a loop
  that takes no step reads nothing. A choice of weights by a number would copy them first.

  Args:
    x_PD: rows.
    experts_P: int32, E for a pair that wants none.
    weights: gate, up and down, each of which gives an expert's matrix for its number.

  Returns:
    (P, D), zeros for pairs that want no expert; and 0, the pairs that were dropped.
  """
  num_experts = weights[0].shape[0]
  rows = min(experts_P.size, BLOCK_ROWS)
  slots = dispatch.blocks(experts_P, num_experts, 1)
  x_SD = dispatch.move(x_PD, slots.pair_of_slot, slots.slot_of_pair)
  x_SD = jnp.pad(x_SD, ((0, rows), (0, 0)))  # a slice at the end would start earlier
  output_SD = jnp.zeros_like(x_SD)
  start = jnp.zeros((), slots.sizes.dtype)
  for expert in range(num_experts):
    size = slots.sizes[expert]

    def block(number, output_SD, expert=expert, start=start, size=size):
      at = start + number * rows
      x_RD = jax.lax.dynamic_slice_in_dim(x_SD, at, rows)
      new_RD = swiglu(x_RD, *(weight[expert] for weight in weights))
      # The rows past the expert's own are those of later ones, which write them again.
      own_R1 = (number * rows + jnp.arange(rows) < size)[:, None]
      new_RD = jnp.where(own_R1, new_RD, 0)
      return jax.lax.dynamic_update_slice_in_dim(output_SD, new_RD, at, 0)

    output_SD = jax.lax.fori_loop(0, -(-size // rows), block, output_SD)
    start = start + size
  output_SD = output_SD[: slots.pair_of_slot.size]
  return dispatch.move(output_SD, slots.slot_of_pair, slots.pair_of_slot), jnp.zeros(())
