"""SwiGLU of experts whose rows lie in one buffer, in order of expert and without gaps.

A buffer with room for whatever the tokens choose is, on one of n devices along `expert`, n times as
long as an even load fills. Grouped matmuls skip the empty rows; what XLA computes between them, and
what is saved for the backward pass, is all rows. So there are two programs, for a buffer that
is usually long enough and for the full one, and at every call each device takes the first if its
rows fit. Both are exact. Devices decide apart, so that neither program may hold a collective.

Legend: P pairs of a token and a choice, S rows of a buffer, E experts, D model, F hidden.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bam_jax.model import dispatch, remat
from bam_jax.model.dispatch import Slots

Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate EDF, up EDF, down EFD
# (x SD, w EDF, sizes E) -> SF, the rows of expert 0 first and then the others' in order.
Matmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def swiglu(
  matmul: Matmul, usual: int, x_PD: jax.Array, weights: Weights, slots: Slots
) -> jax.Array:
  """SwiGLU of every pair by its expert, (P, D), with three grouped matmuls.

  Args:
    matmul: grouped.
    usual: rows of the shorter buffer; as many as there are, or more, for the full one alone.
    x_PD: of the weights' dtype.
    weights: of the experts.
    slots: of parts of one row.
  """
  return _forward(matmul, usual, x_PD, weights, slots)[0]


def _forward(matmul, usual, x_PD, weights, slots):
  *gate_and_up, down_EFD = weights

  def short(slots):
    products = _products(matmul, slots, x_PD, *gate_and_up)
    return _output(matmul, slots, *products, down_EFD), products

  def full(slots):
    nothing = jnp.zeros((usual, down_EFD.shape[1]), x_PD.dtype)
    return short(slots)[0], (nothing, nothing)

  output_PD, products = _either(usual, slots, short, full)
  # Of the full buffer none are saved: its memory would be set aside whether or not it is used.
  products = tuple(checkpoint_name(product, remat.HIDDEN) for product in products)
  return output_PD, (x_PD, weights, slots, products)


def _backward(matmul, usual, saved, slope_PD):
  x_PD, weights, slots, products = saved
  *gate_and_up, down_EFD = weights

  def short(slots, products=products):
    _, pull = jax.vjp(functools.partial(_output, matmul, slots), *products, down_EFD)
    *slopes, d_down_EFD = pull(slope_PD)
    _, pull = jax.vjp(functools.partial(_products, matmul, slots), x_PD, *gate_and_up)
    d_x_PD, *d_gate_and_up = pull(tuple(slopes))
    return d_x_PD, (*d_gate_and_up, d_down_EFD)

  def full(slots):
    return short(slots, _products(matmul, slots, x_PD, *gate_and_up))

  return *_either(usual, slots, short, full), None


swiglu.defvjp(_forward, _backward)


def _either(usual: int, slots: Slots, short: Callable, full: Callable):
  """`short` of the usual slots if all rows are in them, and else `full` of all."""
  if usual >= slots.pair_of_slot.size:
    return short(slots)
  few = slots._replace(
    pair_of_slot=slots.pair_of_slot[:usual], expert_of_part=slots.expert_of_part[:usual]
  )
  fits = jnp.sum(slots.sizes) <= usual
  return jax.lax.cond(fits, lambda: short(few), lambda: full(slots))


def _products(matmul, slots, x_PD, gate_EDF, up_EDF):
  """The two that SwiGLU multiplies."""
  x_SD = dispatch.move(x_PD, slots.pair_of_slot, slots.slot_of_pair)
  return matmul(x_SD, gate_EDF, slots.sizes), matmul(x_SD, up_EDF, slots.sizes)


def _output(matmul, slots, gate_SF, up_SF, down_EFD):
  output_SD = matmul(jax.nn.silu(gate_SF) * up_SF, down_EFD, slots.sizes)
  return dispatch.move(output_SD, slots.slot_of_pair, slots.pair_of_slot)
