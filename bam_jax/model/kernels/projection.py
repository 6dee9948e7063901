"""One matrix for each expert, as in the projections of routed attention.

Rows are sorted by expert, so that each meets the matrix of its own expert and no other.

Legend: A assignments of a token to an expert, S rows of the buffer, R rows of a piece of it,
E experts, D and F rows and columns of a matrix.
"""

import jax
import jax.numpy as jnp

from bam_jax.model import dispatch
from bam_jax.model.dispatch import Slots
from bam_jax.model.kernels import blocked, grouped

_rows, _set_rows = jax.lax.dynamic_slice_in_dim, jax.lax.dynamic_update_slice_in_dim


def slots(experts_A: jax.Array, num_experts: int, platform: str) -> Slots:
  """Where `project` puts the rows: one sort serves every projection of the same assignments.

  Args:
    experts_A: int32, numbers of this device's experts; `num_experts` for none of them.
    num_experts: on this device.
    platform: 'cpu', 'gpu' or 'tpu', which need not be the one at hand.
  """
  rows = 1 if platform == 'tpu' else min(grouped.BLOCK_ROWS[platform], experts_A.size)
  return dispatch.blocks(experts_A, num_experts, rows)


def project(x_AD: jax.Array, w, slots: Slots, platform: str, decoding: bool = False) -> jax.Array:
  """Each assignment's row times the matrix of its expert, (A, F); zeros for those to none.

  Args:
    x_AD: of the weights' dtype; so is the result.
    w: (E, ...), of this device's experts. The dimensions after the first are those of D and then
      those of F: DHK for a query, HKD for an output. In decoding it may be anything that has this
      shape and gives an expert's matrix for its number, as `Apart` does, where it lies: only then
      is nothing copied on CPU. On TPU an array is better, since the rest is stacked first.
    slots: what the function `slots` returns for the same platform.
    platform: 'cpu', 'gpu' or 'tpu', which need not be the one at hand.
    decoding: skips the experts without a row; on CPU and GPU it has no gradient.
  """
  x_SD = dispatch.permute(x_AD, slots)
  if decoding and platform != 'tpu':
    output_SF = _read_in_place(x_SD, w, slots)
  else:
    if not isinstance(w, jax.Array):
      w = jnp.stack([w[expert] for expert in range(w.shape[0])])
    w_EDF = w.reshape(w.shape[0], x_AD.shape[1], -1)
    if platform == 'tpu':
      output_SF = grouped.matmul(x_SD, w_EDF, slots.sizes)
    else:
      output_SF = _by_pieces(x_SD, w_EDF, slots)
  return dispatch.unpermute(output_SF, slots)


def _read_in_place(x_SD: jax.Array, w, slots: Slots) -> jax.Array:
  """For each expert a loop over its parts of the buffer, as in `few.loop`."""
  S, D = x_SD.shape
  rows = S // slots.expert_of_part.size
  parts_E = -(-slots.sizes // rows)
  ends_E = jnp.cumsum(parts_E)
  matrices = [w[expert].reshape(D, -1) for expert in range(w.shape[0])]
  output_SF = jnp.zeros((S, matrices[0].shape[1]), x_SD.dtype)
  for expert, w_DF in enumerate(matrices):

    def multiply(part, output_SF, w_DF=w_DF):
      x_RD = _rows(x_SD, part * rows, rows)
      return _set_rows(output_SF, x_RD @ w_DF, part * rows, 0)

    first = ends_E[expert] - parts_E[expert]
    output_SF = jax.lax.fori_loop(first, ends_E[expert], multiply, output_SF)
  return output_SF


@jax.custom_vjp
def _by_pieces(x_SD: jax.Array, w_EDF: jax.Array, slots: Slots) -> jax.Array:
  """The loop of `blocked`, which ends with the last part that holds a row."""
  return _forward(x_SD, w_EDF, slots)[0]


def _forward(x_SD, w_EDF, slots):
  def piece(rows, start, expert, output_SF):
    w_DF = jax.lax.dynamic_index_in_dim(w_EDF, expert, keepdims=False)
    return _set_rows(output_SF, _rows(x_SD, start, rows) @ w_DF, start, 0)

  S = x_SD.shape[0]
  output_SF = jnp.zeros((S, w_EDF.shape[2]), x_SD.dtype)
  return blocked.each_piece(S, slots, piece, output_SF), (x_SD, w_EDF, slots)


def _backward(saved, d_output_SF):
  x_SD, w_EDF, slots = saved
  dtype = jnp.promote_types(x_SD.dtype, jnp.float32)

  def piece(rows, start, expert, gradients):
    d_x_SD, d_w_EDF = gradients
    x_RD, d_output_RF = _rows(x_SD, start, rows), _rows(d_output_SF, start, rows)
    w_DF = jax.lax.dynamic_index_in_dim(w_EDF, expert, keepdims=False)
    new_DF = jnp.einsum('rd,rf->df', x_RD, d_output_RF, preferred_element_type=dtype)
    d_x_SD = _set_rows(d_x_SD, d_output_RF @ w_DF.T, start, 0)
    return d_x_SD, _set_rows(d_w_EDF, _rows(d_w_EDF, expert, 1) + new_DF, expert, 0)

  zeros = jnp.zeros_like(x_SD), jnp.zeros(w_EDF.shape, dtype)
  d_x_SD, d_w_EDF = blocked.each_piece(x_SD.shape[0], slots, piece, zeros)
  return d_x_SD, d_w_EDF.astype(w_EDF.dtype), None


_by_pieces.defvjp(_forward, _backward)
