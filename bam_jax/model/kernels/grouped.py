"""FFN experts without drops: rows sorted by expert meet the weights of their expert alone.

A buffer with room for whatever tokens choose is mostly empty: every kernel here reads from the
experts' sizes how many rows there are, and computes no more than the tiles that hold them. Rows
that belong to no assignment are zeros, come out as zeros and get no gradient.

Legend: A assignments of a token to an expert, S rows of the buffer, E experts, D model, F hidden.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import xla_metadata

from bam_jax.model import activation, dispatch, remat
from bam_jax.model.activation import Weights
from bam_jax.model.dispatch import Slots
from bam_jax.model.kernels import blocked

ROOM = 2  # over an even load, of the buffer that usually suffices
BLOCK_ROWS = {'cpu': 64, 'gpu': 256}  # of a part of the buffer


def ffn(
  x_AD: jax.Array, experts_A: jax.Array, weights: Weights, all_experts: int, platform: str
) -> jax.Array:
  """What each assignment's expert makes of it, but for the bias of its output, dropping none.

  Args:
    x_AD: of the weights' dtype; so is the result, (A, D), with zeros for assignments to none.
    experts_A: int32, numbers of this device's experts; E for none of them.
    weights: of this device's E experts.
    all_experts: on all devices of the `expert` group.
    platform: 'cpu', 'gpu' or 'tpu', which need not be the one at hand.
  """
  num_experts = weights.down.shape[0]
  if platform == 'tpu':
    slots = dispatch.blocks(experts_A, num_experts, 1)
    usual = math.ceil(ROOM * experts_A.size * num_experts / all_experts)
    return two_buffers(usual, x_AD, weights, slots)
  # XLA for CPU and GPU knows `ragged_dot` only as a matmul of every row with every expert.
  slots = dispatch.blocks(experts_A, num_experts, min(BLOCK_ROWS[platform], experts_A.size))
  output_SD = blocked.ffn(dispatch.permute(x_AD, slots), weights, slots)
  return dispatch.unpermute(output_SD, slots)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def two_buffers(usual: int, x_AD: jax.Array, weights: Weights, slots: Slots) -> jax.Array:
  """What `ffn` returns, with two or three grouped matmuls.

  On one of n devices along `expert` a buffer for any choice is n times as long as an even load
  fills. Grouped matmuls skip the empty rows; what XLA computes between them, and what is saved for
  the backward pass, is all rows. So there are two programs, for a buffer that is usually long
  enough and for the full one, and each device takes the first whenever its rows fit. Both are
  exact. Devices decide separately, so neither program may hold a collective.

  `usual` is the shorter buffer's length, `slots` are of parts of one row.
  """
  return _forward(usual, x_AD, weights, slots)[0]


def _forward(usual, x_AD, weights, slots):
  def short(slots):
    products = _products(slots, x_AD, weights)
    return _output(slots, products, weights), products

  def full(slots):
    nothing = jnp.zeros((usual, weights.down.shape[1]), x_AD.dtype)
    return short(slots)[0], [nothing] * len(weights.into)

  output_AD, products = _either(usual, slots, short, full)
  # Of the full buffer none are saved: their memory would be set aside whether or not it is used.
  products = [checkpoint_name(product, remat.HIDDEN) for product in products]
  return output_AD, (x_AD, weights, slots, products)


def _backward(usual, saved, cotangent_AD):
  x_AD, weights, slots, products = saved

  def short(slots, products=products):
    _, pull = jax.vjp(functools.partial(_output, slots), products, weights)
    d_products, d_weights = pull(cotangent_AD)
    _, pull = jax.vjp(functools.partial(_products, slots), x_AD, weights)
    d_x_AD, d_into = pull(d_products)
    return d_x_AD, dataclasses.replace(d_into, down=d_weights.down)

  def full(slots):
    return short(slots, _products(slots, x_AD, weights))

  return *_either(usual, slots, short, full), None


two_buffers.defvjp(_forward, _backward)


def _either(usual: int, slots: Slots, short: Callable, full: Callable):
  """`short` of the usual slots if all rows are in them, else `full` of all."""
  if usual >= slots.assignment_of_slot.size:
    return short(slots)
  first = slots._replace(
    assignment_of_slot=slots.assignment_of_slot[:usual],
    expert_of_part=slots.expert_of_part[:usual],
  )
  fits = jnp.sum(slots.sizes) <= usual
  return jax.lax.cond(fits, lambda: short(first), lambda: full(slots))


def _products(slots, x_AD, weights):
  """The arguments of `weights.hidden`; parts are of one row."""
  x_SD = dispatch.permute(x_AD, slots)
  products = [matmul(x_SD, into_EDF, slots.sizes) for into_EDF in weights.into]
  return weights.biased(products, lambda b_EF: activation.bias_rows(b_EF, slots.expert_of_part))


def _output(slots, products, weights):
  output_SD = matmul(weights.hidden(*products), weights.down, slots.sizes)
  return dispatch.unpermute(output_SD, slots)


LANES = 128
# Rows, contracted and output columns of a step of XLA's kernel, at most.
TILE = 512, 768, 1024


def matmul(x_SD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """Grouped matmul by XLA's own kernel for TPUs: the rows of expert 0 first, then the others'.

  Its grid, forward and backward, has as many tiles of rows as the sizes fill, which a kernel before
  it counts: the compiled program says so, and a test looks. What lies beyond them is not written.
  """
  S = x_SD.shape[0]
  # Of a number of rows that is not whole tiles XLA multiplies every row with every expert.
  x_SD = jnp.pad(x_SD, ((0, -S % LANES), (0, 0)))
  used_S1 = (jnp.arange(x_SD.shape[0]) < jnp.sum(sizes_E))[:, None]
  # The first mask keeps the gradient of unused rows from being what the kernel left in memory, the
  # second the result. XLA merges both with the operations around the kernel.
  output_SF = _ragged_dot(jnp.where(used_S1, x_SD, 0), w_EDF, sizes_E)
  return jnp.where(used_S1, output_SF, 0)[:S]


@jax.custom_vjp
def _ragged_dot(x_SD, w_EDF, sizes_E):
  """`ragged_dot`, whose gradients have tiles of their own."""
  with _tiles(x_SD.shape[0], *w_EDF.shape[1:]):
    return jax.lax.ragged_dot(x_SD, w_EDF, sizes_E)


def _ragged_dot_forward(x_SD, w_EDF, sizes_E):
  return _ragged_dot(x_SD, w_EDF, sizes_E), (x_SD, w_EDF, sizes_E)


def _ragged_dot_backward(saved, cotangent_SF):
  x_SD, w_EDF, sizes_E = saved
  with _tiles(*cotangent_SF.shape, x_SD.shape[1]):
    d_x_SD = jax.lax.ragged_dot(cotangent_SF, w_EDF.swapaxes(1, 2), sizes_E)
  with _tiles(*x_SD.shape, cotangent_SF.shape[1], gradient=True):
    d_w_EDF = jax.lax.ragged_dot_general(x_SD, cotangent_SF, sizes_E, _ROWS_CONTRACTED)
  return d_x_SD, d_w_EDF, None


_ragged_dot.defvjp(_ragged_dot_forward, _ragged_dot_backward)
_ROWS_CONTRACTED = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[],
)


def _tiles(rows: int, contracted: int, columns: int, gradient: bool = False):
  """A context in which XLA's kernel works in larger tiles than its own.

  Its own read the rows once for every 128 columns where it splits the contracted dimension, and
  always for a weight's gradient: several times the bytes that the matmul has time for. Where it
  does not split, as for matrices wider than high, its own are better.
  """
  sizes = zip((rows, contracted, columns), TILE)
  # The largest multiples of LANES that divide the sizes.
  tile = [next((n for n in range(m, 0, -LANES) if size % n == 0), None) for size, m in sizes]
  if None in tile or not (gradient or contracted > columns):
    return contextlib.nullcontext()
  return xla_metadata.set_xla_metadata(ragged_dot_tiling=','.join(map(str, tile)))
