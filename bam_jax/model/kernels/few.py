"""SwiGLU of experts for few rows, as in decoding: an expert without a row is not read.

Legend: A assignments of a token to an expert, S rows sorted by expert, R rows of a block,
E experts, D model, F hidden, f columns of a step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bam_jax.model import dispatch

BLOCK_ROWS = 64  # that meet an expert's weights at once
TILE_ROWS = 16  # of bfloat16, on TPU
LANES = 128
STEP_BYTES = 2**20  # of a matrix, about, that a step of the TPU's kernel reads


def swiglu(x_AD: jax.Array, experts_A: jax.Array, weights, platform: str) -> jax.Array:
  """`(silu(x W_gate) * (x W_up)) W_down` of each assignment's expert, (A, D), as in `grouped`.

  Args:
    x_AD: on TPU at most BLOCK_ROWS rows.
    experts_A: int32, numbers of experts; E for none.
    weights: gate, up and down, each of which gives an expert's matrix for its number; on TPU arrays
      EDF, EDF and EFD.
    platform: 'cpu', 'gpu' or 'tpu', which need not be the one at hand.
  """
  if platform == 'tpu':
    return visit(x_AD, experts_A, weights)
  return loop(x_AD, experts_A, weights)


def loop(x_AD: jax.Array, experts_A: jax.Array, weights) -> jax.Array:
  """For each expert a loop over its rows, which reads its weights where they lie.

  A loop of no steps reads nothing; choosing weights by a number would copy them first.
  """
  num_experts = weights[0].shape[0]
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
      gate_DF, up_DF, down_FD = (weight[expert] for weight in weights)
      new_RD = (jax.nn.silu(x_RD @ gate_DF) * (x_RD @ up_DF)) @ down_FD
      # The rows past the expert's own are those of later ones, which write them again.
      its_R1 = (number * rows + jnp.arange(rows) < size)[:, None]
      new_RD = jnp.where(its_R1, new_RD, 0)
      return jax.lax.dynamic_update_slice_in_dim(output_SD, new_RD, at, 0)

    output_SD = jax.lax.fori_loop(0, -(-size // rows), block, output_SD)
    start = start + size
  return dispatch.unpermute(output_SD[: slots.assignment_of_slot.size], slots)


def visit(x_AD: jax.Array, experts_A: jax.Array, weights, interpret: bool = False) -> jax.Array:
  """A TPU kernel whose grid goes over the experts that have a row.

  XLA would fetch what a loop may read before it knows whether the loop runs. Here all rows meet
  every such expert, and count where it is theirs. `interpret` runs the kernel's steps on any
  platform, slowly.
  """
  gate_EDF, _, down_EFD = weights
  E, D, F = gate_EDF.shape
  f = _columns(F, D * gate_EDF.dtype.itemsize)
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
  max_visits = min(E, A)
  if not interpret:  # else XLA copies them to the chip whole, before the kernel reads them there
    weights = [pltpu.with_memory_space_constraint(w, pltpu.HBM) for w in weights]
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
      flops=2 * 3 * D * F * x_RD.shape[0] * max_visits,
      transcendentals=F * x_RD.shape[0] * max_visits,
      bytes_accessed=max_visits * 3 * D * F * gate_EDF.dtype.itemsize,
    ),
    interpret=interpret,
    name='visited_experts',
  )(order_E, experts_R1, x_RD, *weights)
  return output_RD[:A].astype(x_AD.dtype)


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
  limit = max(STEP_BYTES // column_bytes, LANES) // LANES * LANES
  return next((f for f in range(limit, 0, -LANES) if F % f == 0), F)
