"""Experts' FFN where the weights are what takes time: an expert without a token is not read.

Legend: P pairs of a token and a choice, S rows sorted by expert, R rows of a block, E experts,
D model, F hidden, f columns of a step.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bam_jax.model import dispatch
from bam_jax.model.ffn import swiglu

BLOCK_ROWS = 64  # that meet an expert's weights at once
TILE_ROWS = 16  # of bfloat16, on TPU
LANES = 128
STEP_BYTES = 2**20  # of a matrix, about, that a step of the TPU's kernel reads

# (x PD, experts P, weights) -> (P, D), zeros for pairs that want no expert; and 0, what was dropped
Experts = Callable[..., tuple[jax.Array, jax.Array]]


def choose(platform: str, many: Experts) -> Experts:
  """The function for a platform ('cpu', 'gpu' or 'tpu'), which need not be the one at hand.

  Args:
    platform: whose devices.
    many: training's; on TPU for more rows than meet weights at once.
  """
  if platform != 'tpu':
    return loops
  return lambda x_PD, *rest: (few if x_PD.shape[0] <= BLOCK_ROWS else many)(x_PD, *rest)


def loops(x_PD: jax.Array, experts_P: jax.Array, weights) -> tuple[jax.Array, jax.Array]:
  """`(silu(x W_gate) * (x W_up)) W_down` of each pair's expert.

  Every expert has a loop of its own over its rows, which reads its weights where they lie; a loop
  that takes no step reads nothing. A choice of weights by a number would copy them first.

  Args:
    x_PD: rows.
    experts_P: int32, E for a pair that wants none.
    weights: gate, up and down, each of which gives an expert's matrix for its number.
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


def few(
  x_PD: jax.Array, experts_P: jax.Array, weights, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """What `loops` computes, by a TPU kernel whose grid goes over the experts that are wanted.

  XLA fetches what a loop may read before it knows whether the loop runs. Here all rows meet every
  expert that one of them wants, and count where it is theirs.

  Args:
    x_PD: at most `BLOCK_ROWS` rows.
    experts_P: int32, E for a pair that wants none.
    weights: gate EDF, up EDF and down EFD.
    interpret: run the kernel's own steps on any platform, slowly.
  """
  gate_EDF, _, down_EFD = weights
  E, D, F = gate_EDF.shape
  f = _columns(F, D * gate_EDF.dtype.itemsize)
  P = x_PD.shape[0]
  spare = -P % TILE_ROWS
  x_RD = jnp.pad(x_PD, ((0, spare), (0, 0)))
  experts_R1 = jnp.pad(experts_P, (0, spare), constant_values=E)[:, None]
  wanted_E = (experts_R1 == jnp.arange(E)).any(0)
  order_E = jnp.argsort(~wanted_E, stable=True).astype(jnp.int32)
  visits = jnp.maximum(jnp.sum(wanted_E), 1)  # a grid of no step would write nothing
  rows = lambda columns: pl.BlockSpec((P + spare, columns), lambda visit, part, order: (0, 0))
  into = pl.BlockSpec((1, D, f), lambda visit, part, order: (order[visit], 0, part))
  back = pl.BlockSpec((1, f, D), lambda visit, part, order: (order[visit], part, 0))
  most = min(E, P)
  output_RD = pl.pallas_call(
    _visit,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(visits, F // f),
      in_specs=[rows(1), rows(D), into, into, back],
      out_specs=rows(D),
    ),
    out_shape=jax.ShapeDtypeStruct(x_RD.shape, jnp.promote_types(x_RD.dtype, jnp.float32)),
    cost_estimate=pl.CostEstimate(
      flops=2 * 3 * D * F * x_RD.shape[0] * most,
      transcendentals=F * x_RD.shape[0] * most,
      bytes_accessed=most * 3 * D * F * gate_EDF.dtype.itemsize,
    ),
    interpret=interpret,
    name='visited_experts',
  )(order_E, experts_R1, x_RD, *(w if interpret else _in_hbm(w) for w in weights))
  return output_RD[:P].astype(x_PD.dtype), jnp.zeros(())


def _visit(order_E, experts_R1, x_RD, gate_1Df, up_1Df, down_1fD, output_RD):
  """A step of the kernel: some hidden columns of one expert."""
  visit, part = pl.program_id(0), pl.program_id(1)

  @pl.when((visit == 0) & (part == 0))
  def _():
    output_RD[...] = jnp.zeros_like(output_RD)

  product = functools.partial(jnp.dot, preferred_element_type=output_RD.dtype)
  hidden_Rf = jax.nn.silu(product(x_RD[...], gate_1Df[0])) * product(x_RD[...], up_1Df[0])
  mine_R1 = experts_R1[...] == order_E[visit]
  hidden_Rf = jnp.where(mine_R1, hidden_Rf, 0).astype(x_RD.dtype)
  output_RD[...] += product(hidden_Rf, down_1fD[0])


def _columns(F: int, column_bytes: int) -> int:
  """Hidden columns of a step: whole tiles that divide F, or else all."""
  most = max(STEP_BYTES // column_bytes, LANES) // LANES * LANES
  return next((f for f in range(most, 0, -LANES) if F % f == 0), F)


def _in_hbm(x: jax.Array) -> jax.Array:
  """`x`, which XLA shall not copy to the chip, in whole, for the kernel to read it there."""
  return pltpu.with_memory_space_constraint(x, pltpu.HBM)
