"""FFN experts for few rows, as in decoding: an expert without a row is not read.

Both functions return what each assignment's expert makes of it, (A, D), as `grouped.ffn` does, from
rows x_AD, the int32 numbers of their experts, E for none, and the experts' weights.

Legend: A assignments of a token to an expert, S rows sorted by expert, R rows of a block,
E experts, D model, F hidden, f columns of a step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bam_jax.model import dispatch
from bam_jax.model.activation import Weights

BLOCK_ROWS = 64  # that meet an expert's weights at once
TILE_ROWS = 16  # of bfloat16, on TPU
LANES = 128
STEP_BYTES = 2**20  # of a matrix, about, that a step of the TPU's kernel reads


def loop(x_AD: jax.Array, experts_A: jax.Array, weights: Weights) -> jax.Array:
  """For each expert a loop over its rows, which reads its weights where they lie.

  A loop of no steps reads nothing; choosing weights by a number would copy them first. Matrices may
  be anything that gives an expert's for its number.
  """
  num_experts = weights.down.shape[0]
  rows = min(experts_A.size, BLOCK_ROWS)
  slots = dispatch.blocks(experts_A, num_experts, 1)
  x_SD = dispatch.permute(x_AD, slots)
  x_SD = jnp.pad(x_SD, ((0, rows), (0, 0)))  # a slice at the end would start earlier
  output_SD = jnp.zeros_like(x_SD)
  start = jnp.zeros((), slots.sizes.dtype)
  for expert in range(num_experts):
    size = slots.sizes[expert]

    def block(number, output_SD, expert=expert, start=start, size=size):
      at = start + number * rows
      x_RD = jax.lax.dynamic_slice_in_dim(x_SD, at, rows)
      products = [x_RD @ into_EDF[expert] for into_EDF in weights.into]
      products = weights.biased(products, lambda bias_EF: bias_EF[expert])
      new_RD = weights.hidden(*products) @ weights.down[expert]
      # The rows past the expert's own are those of later ones, which write them again.
      its_R1 = (number * rows + jnp.arange(rows) < size)[:, None]
      new_RD = jnp.where(its_R1, new_RD, 0)
      return jax.lax.dynamic_update_slice_in_dim(output_SD, new_RD, at, 0)

    output_SD = jax.lax.fori_loop(0, -(-size // rows), block, output_SD)
    start = start + size
  return dispatch.unpermute(output_SD[: slots.assignment_of_slot.size], slots)


def visit(
  x_AD: jax.Array, experts_A: jax.Array, weights: Weights, interpret: bool = False
) -> jax.Array:
  """A TPU kernel whose grid goes over the experts that have a row; at most BLOCK_ROWS rows.

  XLA would fetch what a loop may read before it knows whether the loop runs. Here all rows meet
  every such expert, and count where it is theirs. `interpret` runs the kernel's steps on any
  platform, slowly.
  """
  E, D, F = weights.into[0].shape
  f, count = _columns(F, D * weights.down.dtype.itemsize), len(weights.into)
  A = x_AD.shape[0]
  spare = -A % TILE_ROWS
  x_RD = jnp.pad(x_AD, ((0, spare), (0, 0)))
  experts_R1 = jnp.pad(experts_A, (0, spare), constant_values=E)[:, None]
  wanted_E = (experts_R1 == jnp.arange(E)).any(0)
  order_E = jnp.argsort(~wanted_E, stable=True).astype(jnp.int32)
  visits = jnp.maximum(jnp.sum(wanted_E), 1)  # a grid of no step would write nothing
  rows = lambda columns: pl.BlockSpec((A + spare, columns), lambda visit, part, order: (0, 0))
  into = pl.BlockSpec((1, D, f), lambda visit, part, order: (order[visit], 0, part))
  back = pl.BlockSpec((1, f, D), lambda visit, part, order: (order[visit], part, 0))
  bias = pl.BlockSpec((1, 1, f), lambda visit, part, order: (order[visit], 0, part))
  max_visits = min(E, A)
  matrices = *weights.into, weights.down
  if not interpret:  # else XLA copies them to the chip whole, before the kernel reads them there
    matrices = [pltpu.with_memory_space_constraint(w, pltpu.HBM) for w in matrices]
  output_RD = pl.pallas_call(
    functools.partial(_visit, weights.ffn, count),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(visits, F // f),
      in_specs=[rows(1), rows(D), *[into] * count, back, *[bias] * len(weights.biases)],
      out_specs=rows(D),
    ),
    out_shape=jax.ShapeDtypeStruct(x_RD.shape, jnp.promote_types(x_RD.dtype, jnp.float32)),
    cost_estimate=pl.CostEstimate(
      flops=2 * len(matrices) * D * F * x_RD.shape[0] * max_visits,
      transcendentals=F * x_RD.shape[0] * max_visits,
      bytes_accessed=max_visits * len(matrices) * D * F * weights.down.dtype.itemsize,
    ),
    interpret=interpret,
    name='visited_experts',
  )(order_E, experts_R1, x_RD, *matrices, *(bias_EF[:, None] for bias_EF in weights.biases))
  return output_RD[:A].astype(x_AD.dtype)


def _visit(ffn: str, count: int, order_E, experts_R1, x_RD, *arrays_and_output):
  """A step of the kernel: some hidden columns of one expert."""
  *arrays, output_RD = arrays_and_output
  visit, part = pl.program_id(0), pl.program_id(1)

  @pl.when((visit == 0) & (part == 0))
  def _():
    output_RD[...] = jnp.zeros_like(output_RD)

  product = functools.partial(jnp.dot, preferred_element_type=output_RD.dtype)
  matrices, biases = [array[0] for array in arrays[: count + 1]], arrays[count + 1 :]
  weights = Weights(tuple(matrices[:-1]), matrices[-1], tuple(b[0] for b in biases), ffn)
  hidden_Rf = weights.hidden(*weights.biased([product(x_RD[...], w_Df) for w_Df in weights.into]))
  mine_R1 = experts_R1[...] == order_E[visit]
  hidden_Rf = jnp.where(mine_R1, hidden_Rf, 0).astype(x_RD.dtype)
  output_RD[...] += product(hidden_Rf, weights.down)


def _columns(F: int, column_bytes: int) -> int:
  """Hidden columns of a step: whole tiles that divide F, or else all."""
  limit = max(STEP_BYTES // column_bytes, LANES) // LANES * LANES
  return next((f for f in range(limit, 0, -LANES) if F % f == 0), F)
