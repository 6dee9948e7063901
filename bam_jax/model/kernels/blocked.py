"""SwiGLU of experts for CPU and GPU: a loop over pieces of rows that are sorted by expert.

Legend: S rows of the buffer, R rows of a piece of it, E experts, D model, F hidden.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bam_jax.model import remat
from bam_jax.model.dispatch import Slots

_of, _rows = jax.lax.dynamic_index_in_dim, jax.lax.dynamic_slice_in_dim
_set_rows = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
MAX_PARTS = 8  # of one expert that are multiplied at once


@jax.custom_vjp
def swiglu(x_SD: jax.Array, weights: tuple, slots: Slots) -> jax.Array:
  """SwiGLU by a loop over pieces of the buffer: up to `MAX_PARTS` parts of one expert in a row.

  It ends with the last part that holds a row. Large pieces are few: each copies its expert's
  weights, and adds to the sum of their gradient. Small parts leave little of the buffer empty.
  """
  return _forward(x_SD, weights, slots)[0]


def _forward(x_SD, weights, slots):
  F = weights[0].shape[-1]

  def piece(rows, start, expert, results):
    x_RD = _rows(x_SD, start, rows)
    gate_DF, up_DF, down_FD = (_of(w, expert, keepdims=False) for w in weights)
    gate_RF, up_RF = x_RD @ gate_DF, x_RD @ up_DF
    output_RD = _gated(gate_RF, up_RF) @ down_FD
    new = output_RD, gate_RF, up_RF
    return tuple(_set_rows(old, new, start) for old, new in zip(results, new))

  hidden_SF = jnp.zeros((x_SD.shape[0], F), x_SD.dtype)
  start = jnp.zeros_like(x_SD), hidden_SF, hidden_SF
  output_SD, gate_SF, up_SF = _each_piece(x_SD.shape[0], slots, piece, start)
  gate_SF, up_SF = (checkpoint_name(x, remat.HIDDEN) for x in (gate_SF, up_SF))
  return output_SD, (x_SD, weights, slots, gate_SF, up_SF)


def _backward(residuals, d_output_SD):
  x_SD, weights, slots, gate_SF, up_SF = residuals
  dtype = jnp.promote_types(x_SD.dtype, jnp.float32)

  def piece(rows, start, expert, gradients):
    x_RD, gate_RF, up_RF, d_output_RD = (
      _rows(x, start, rows) for x in (x_SD, gate_SF, up_SF, d_output_SD)
    )
    gate_DF, up_DF, down_FD = (_of(w, expert, keepdims=False) for w in weights)
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


swiglu.defvjp(_forward, _backward)


def _each_piece(num_rows: int, slots: Slots, piece: Callable, carry):
  """`carry = piece(rows, start, expert, carry)` for all pieces of the buffer; rows is static."""
  num_parts = slots.expert_of_part.size
  rows = num_rows // num_parts
  # No expert has more parts than this, when every other has one that is not full.
  max_parts = min(MAX_PARTS, max(num_parts - slots.sizes.size + 1, 1))
  ends_E = jnp.cumsum(-(-slots.sizes // rows))  # of the experts' parts
  branches = [partial(piece, count * rows) for count in range(1, max_parts + 1)]

  def step(state):
    part, carry = state
    expert = slots.expert_of_part[part]
    count = jnp.minimum(ends_E[expert] - part, max_parts)
    return part + count, jax.lax.switch(count - 1, branches, part * rows, expert, carry)

  more = lambda state: state[0] < ends_E[-1]
  return jax.lax.while_loop(more, step, (jnp.zeros_like(ends_E[0]), carry))[1]


def _gated(gate_RF, up_RF) -> jax.Array:
  return jax.nn.silu(gate_RF) * up_RF
