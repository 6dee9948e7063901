"""FFN experts for CPU and GPU: a loop over pieces of rows that are sorted by expert.

Legend: S rows of the buffer, R rows of a piece of it, E experts, D model, F hidden.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bam_jax.model import remat
from bam_jax.model.activation import Weights
from bam_jax.model.dispatch import Slots

_of, _rows = jax.lax.dynamic_index_in_dim, jax.lax.dynamic_slice_in_dim
_set_rows = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
MAX_PARTS = 8  # of one expert that are multiplied at once


@jax.custom_vjp
def ffn(x_SD: jax.Array, weights: Weights, slots: Slots) -> jax.Array:
  """The experts' FFN by a loop over pieces of the buffer: up to `MAX_PARTS` parts of one expert.

  It ends with the last part that holds a row. Large pieces are few: each copies its expert's
  weights, and adds to the sum of their gradient. Small parts leave little of the buffer empty.
  """
  return _forward(x_SD, weights, slots)[0]


def _forward(x_SD, weights, slots):
  def piece(rows, start, expert, results):
    x_RD = _rows(x_SD, start, rows)
    own = jax.tree.map(lambda w: _of(w, expert, keepdims=False), weights)
    products = own.biased([x_RD @ into_DF for into_DF in own.into])
    new = own.hidden(*products) @ own.down, *products
    return tuple(_set_rows(old, new, start) for old, new in zip(results, new))

  hidden_SF = jnp.zeros((x_SD.shape[0], weights.down.shape[1]), x_SD.dtype)
  start = jnp.zeros_like(x_SD), *[hidden_SF] * len(weights.into)
  output_SD, *products = each_piece(x_SD.shape[0], slots, piece, start)
  products = [checkpoint_name(x_SF, remat.HIDDEN) for x_SF in products]
  return output_SD, (x_SD, weights, slots, products)


def _backward(residuals, d_output_SD):
  x_SD, weights, slots, products = residuals
  dtype = jnp.promote_types(x_SD.dtype, jnp.float32)

  def piece(rows, start, expert, gradients):
    x_RD, d_output_RD, *products_RF = (
      _rows(x, start, rows) for x in (x_SD, d_output_SD, *products)
    )
    own = jax.tree.map(lambda w: _of(w, expert, keepdims=False), weights)
    hidden_RF, pull = jax.vjp(own.hidden, *products_RF)
    d_products = pull(d_output_RD @ own.down.T)
    d_x_RD = sum(d_RF @ into_DF.T for d_RF, into_DF in zip(d_products, own.into))
    outer = partial(jnp.einsum, 'ri,ro->io', preferred_element_type=dtype)
    new = Weights(
      tuple(outer(x_RD, d_RF) for d_RF in d_products),
      outer(hidden_RF, d_output_RD),
      tuple(d_RF.sum(0, dtype=dtype) for d_RF in d_products) if own.biases else (),
      own.ffn,
    )
    d_x_SD, sums = gradients
    add = lambda d, new: _set_rows(d, _rows(d, expert, 1) + new, expert)
    return _set_rows(d_x_SD, d_x_RD, start), jax.tree.map(add, sums, new)

  start = jnp.zeros_like(x_SD), jax.tree.map(lambda w: jnp.zeros(w.shape, dtype), weights)
  d_x_SD, d_weights = each_piece(x_SD.shape[0], slots, piece, start)
  return d_x_SD, jax.tree.map(lambda d: d.astype(x_SD.dtype), d_weights), None


ffn.defvjp(_forward, _backward)


def each_piece(num_rows: int, slots: Slots, piece: Callable, carry):
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
