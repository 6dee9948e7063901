"""Experts' matmuls: rows sorted by expert meet the weights of their expert, and no others.

A buffer has room for the worst choice that tokens can make, and most of it is empty: every kernel
here reads from the experts' sizes how many rows there are, and computes no more than the tiles that
hold them. Rows that are nobody's are given as zeros, come out as zeros and get no gradient.

Legend: S rows of the buffer, R rows of a piece of it, E experts, D model, F hidden.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import xla_metadata
from jax.experimental.pallas.ops.tpu import megablox

from bam_jax.model import dispatch, remat
from bam_jax.model.dispatch import Slots
from bam_jax.model.kernels import sorted_rows
from bam_jax.model.kernels.sorted_rows import Matmul, Weights


class Kernel(NamedTuple):
  """How one kind of device computes `(silu(x W_gate) * (x W_up)) W_down` of every expert."""

  rows: int  # of a part: what `dispatch.blocks` is to be asked for, at most the number of pairs
  # (rows that usually suffice, x PD, weights, slots) -> PD
  swiglu: Callable[[int, jax.Array, Weights, Slots], jax.Array]


def choose(platform: str) -> Kernel:
  """The kernel for a platform ('cpu', 'gpu' or 'tpu'), which need not be the one at hand."""
  if platform != 'tpu':
    # XLA for CPU and GPU knows `ragged_dot` only as a matmul of every row with every expert.
    return Kernel(64 if platform == 'cpu' else 256, in_blocks)
  matmul = ragged if jax.__version_info__ >= (0, 12) else megablocks
  return Kernel(1, functools.partial(sorted_rows.swiglu, matmul))


LANES = 128
# Rows, contracted and output columns of a step of the kernel, at most; megablox's default of 128
# each is four times slower.
TILE = 512, 768, 1024


def ragged(x_SD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """Grouped matmul by XLA's own kernel for TPUs.

  Its grid, forward and backward, has as many tiles of rows as the sizes fill, which a kernel before
  it counts: the compiled program says so, and a test looks. What lies beyond them is not written.
  """
  return _padded(_ragged_dot, x_SD, w_EDF, sizes_E)


@jax.custom_vjp
def _ragged_dot(x_SD, w_EDF, sizes_E):
  """`ragged_dot`, whose gradients have their own tiles."""
  with _tiles(x_SD.shape[0], *w_EDF.shape[1:]):
    return jax.lax.ragged_dot(x_SD, w_EDF, sizes_E)


def _ragged_dot_forward(x_SD, w_EDF, sizes_E):
  return _ragged_dot(x_SD, w_EDF, sizes_E), (x_SD, w_EDF, sizes_E)


def _ragged_dot_backward(saved, slope_SF):
  x_SD, w_EDF, sizes_E = saved
  with _tiles(*slope_SF.shape, x_SD.shape[1]):
    slope_SD = jax.lax.ragged_dot(slope_SF, w_EDF.swapaxes(1, 2), sizes_E)
  with _tiles(*x_SD.shape, slope_SF.shape[1], gradient=True):
    slope_EDF = jax.lax.ragged_dot_general(x_SD, slope_SF, sizes_E, _ROWS_CONTRACTED)
  return slope_SD, slope_EDF, None


_ragged_dot.defvjp(_ragged_dot_forward, _ragged_dot_backward)
_ROWS_CONTRACTED = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[],
)


def _tiles(rows: int, contracted: int, columns: int, gradient: bool = False):
  """A context in which XLA's kernel works in larger tiles than its own.

  Its own read the rows once for every 128 columns where it splits the contracted dimension, and
  always for a weight's gradient: several times the bytes that the matmul has time for. Where
  it does not split, as for matrices wider than high, its own are the better ones.
  """
  tile = [_divisor(size, most) for size, most in zip((rows, contracted, columns), TILE)]
  if None in tile or not (gradient or contracted > columns):
    return contextlib.nullcontext()
  return xla_metadata.set_xla_metadata(ragged_dot_tiling=','.join(map(str, tile)))


def _divisor(size: int, most: int) -> int | None:
  """The largest multiple of LANES that divides `size`, at most `most`; None if there is none."""
  return next((n for n in range(most, 0, -LANES) if size % n == 0), None)


def megablocks(
  x_SD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, interpret: bool = False
) -> jax.Array:
  """Grouped matmul by JAX's megablox kernel, for versions whose `ragged_dot` has a dense gradient.

  Its grid too is counted from the sizes (arXiv 2211.15841).

  Args:
    x_SD: bfloat16 or float32.
    w_EDF: of the same dtype.
    sizes_E: int32.
    interpret: run the kernel's own steps on any platform, slowly.
  """

  def matmul(x_SD, w_EDF, sizes_E):
    rows = next(rows for rows in (TILE[0], 256, LANES) if x_SD.shape[0] % rows == 0)
    tile = rows, *TILE[1:]
    return megablox.gmm(x_SD, w_EDF, sizes_E, x_SD.dtype, tile, interpret=interpret)

  return _padded(matmul, x_SD, w_EDF, sizes_E)


def _padded(matmul: Matmul, x_SD, w_EDF, sizes_E):
  """A matmul of whole tiles, for without them XLA multiplies every row with every expert.

  The first mask keeps the gradient of the rows past the sizes' sum from being what the kernel left
  in memory, the second the result. Both are part of the operations around the kernel.
  """
  S = x_SD.shape[0]
  x_SD = jnp.pad(x_SD, ((0, -S % LANES), (0, 0)))
  used_S1 = (jnp.arange(x_SD.shape[0]) < jnp.sum(sizes_E))[:, None]
  output_SF = matmul(jnp.where(used_S1, x_SD, 0), w_EDF, sizes_E)
  return jnp.where(used_S1, output_SF, 0)[:S]


MOST_PARTS = 8  # of one expert that are multiplied at once


def in_blocks(usual: int, x_PD: jax.Array, weights: Weights, slots: Slots) -> jax.Array:
  """SwiGLU of every pair, (P, D), by `blocked`, to which it is all one how long the buffer is."""
  del usual
  x_SD = dispatch.move(x_PD, slots.pair_of_slot, slots.slot_of_pair)
  output_SD = blocked(x_SD, weights, slots)
  return dispatch.move(output_SD, slots.slot_of_pair, slots.pair_of_slot)


@jax.custom_vjp
def blocked(x_SD: jax.Array, weights: Weights, slots: Slots) -> jax.Array:
  """SwiGLU by a loop over pieces of the buffer: up to `MOST_PARTS` parts of one expert in a row.

  It ends with the last part that holds a row. Large pieces are few: each copies its expert's
  weights, and adds to the sum of their gradient. Small parts leave little of the buffer empty.
  """
  return _blocked_forward(x_SD, weights, slots)[0]


def _blocked_forward(x_SD, weights, slots):
  F = weights[0].shape[-1]

  def piece(rows, start, expert, results):
    x_RD = _rows(x_SD, start, rows)
    gate_DF, up_DF, down_FD = (_of(w, expert) for w in weights)
    gate_RF, up_RF = x_RD @ gate_DF, x_RD @ up_DF
    output_RD = _gated(gate_RF, up_RF) @ down_FD
    new = output_RD, gate_RF, up_RF
    return tuple(_set_rows(old, new, start) for old, new in zip(results, new))

  hidden_SF = jnp.zeros((x_SD.shape[0], F), x_SD.dtype)
  start = jnp.zeros_like(x_SD), hidden_SF, hidden_SF
  output_SD, gate_SF, up_SF = _each_piece(x_SD.shape[0], slots, piece, start)
  gate_SF, up_SF = (checkpoint_name(x, remat.HIDDEN) for x in (gate_SF, up_SF))
  return output_SD, (x_SD, weights, slots, gate_SF, up_SF)


def _blocked_backward(residuals, d_output_SD):
  x_SD, weights, slots, gate_SF, up_SF = residuals
  dtype = jnp.promote_types(x_SD.dtype, jnp.float32)

  def piece(rows, start, expert, gradients):
    x_RD, gate_RF, up_RF, d_output_RD = (
      _rows(x, start, rows) for x in (x_SD, gate_SF, up_SF, d_output_SD)
    )
    gate_DF, up_DF, down_FD = (_of(w, expert) for w in weights)
    hidden_RF, pull = jax.vjp(_gated, gate_RF, up_RF)
    d_gate_RF, d_up_RF = pull(d_output_RD @ down_FD.T)
    d_x_RD = d_gate_RF @ gate_DF.T + d_up_RF @ up_DF.T
    pairs = (x_RD, d_gate_RF), (x_RD, d_up_RF), (hidden_RF, d_output_RD)
    products = [jnp.einsum('ri,ro->io', *pair, preferred_element_type=dtype) for pair in pairs]
    d_x_SD, *d_weights = gradients
    sums = [_set_rows(d, _rows(d, expert, 1) + new, expert) for d, new in zip(d_weights, products)]
    return _set_rows(d_x_SD, d_x_RD, start), *sums

  start = jnp.zeros_like(x_SD), *(jnp.zeros(w.shape, dtype) for w in weights)
  d_x_SD, *d_weights = _each_piece(x_SD.shape[0], slots, piece, start)
  return d_x_SD, tuple(d.astype(x_SD.dtype) for d in d_weights), None


blocked.defvjp(_blocked_forward, _blocked_backward)


def _each_piece(num_rows, slots, piece, carry):
  """`carry = piece(rows, start, expert, carry)` for all pieces of the buffer, rows a constant."""
  num_parts = slots.expert_of_part.size
  rows = num_rows // num_parts
  # Of one expert, when every other has its part that is not full.
  most = min(MOST_PARTS, max(num_parts - slots.sizes.size + 1, 1))
  ends_E = jnp.cumsum(-(-slots.sizes // rows))  # of the experts' parts
  branches = [functools.partial(piece, count * rows) for count in range(1, most + 1)]

  def step(state):
    part, carry = state
    expert = slots.expert_of_part[part]
    count = jnp.minimum(ends_E[expert] - part, most)
    return part + count, jax.lax.switch(count - 1, branches, part * rows, expert, carry)

  more = lambda state: state[0] < ends_E[-1]
  return jax.lax.while_loop(more, step, (jnp.zeros_like(ends_E[0]), carry))[1]


def _gated(gate_RF, up_RF):
  return jax.nn.silu(gate_RF) * up_RF


def _of(w, expert):
  return jax.lax.dynamic_index_in_dim(w, expert, keepdims=False)


def _rows(x, start, rows):
  return jax.lax.dynamic_slice_in_dim(x, start, rows)


def _set_rows(x, rows, start):
  return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)
