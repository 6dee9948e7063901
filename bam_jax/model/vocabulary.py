"""The model's two ends, whose arrays have a row for every word and are never whole on a device.

`tensor` and `expert` cut the vocabulary: a token's row is read where it lies, and the scores of all
words are computed where the words lie, for the tokens of the whole group. Over `fsdp` whichever is
less moves, the tokens to the words or the words to the tokens.

Legend: B batch, T sequence, D model, V vocabulary, N tokens, W words of this device.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bam_jax.parallel import collectives as layout_lib


class Words(NamedTuple):
  """This device's words, and where the others are."""

  kernel: jax.Array  # (W, D), or (D, W) when `transposed`
  first: jax.Array | int  # the number of the first of them
  tokens_over: tuple[str, ...]  # axes along which tokens move to the words
  over: tuple[str, ...]  # axes along which the words lie


def words(
  layout: layout_lib.Layout, kernel: jax.Array, num_tokens: int, dtype, transposed: bool = False
) -> Words:
  """This device's words, those of its `fsdp` group if that moves less than its tokens.

  Args:
    layout: the collectives.
    kernel: this device's part, (W, D) or (D, W); any floating dtype.
    num_tokens: this device's.
    dtype: in which words travel.
    transposed: whether the kernel is (D, W).
  """
  axis = 1 if transposed else 0
  fsdp, expert = layout.sizes['fsdp'], layout.sizes['expert']
  tokens_move = num_tokens * expert <= kernel.shape[axis]  # both times fsdp - 1
  over = layout.over('tensor', 'expert', *(('fsdp',) if tokens_move else ()))
  if fsdp > 1 and not tokens_move:
    kernel = layout.gather(kernel.astype(dtype), 'fsdp', dimension=axis)
  # The order of sharding.VOCABULARY, in which fsdp is innermost.
  first = kernel.shape[axis] * jax.lax.axis_index(over) if over else 0
  return Words(kernel, first, layout.over(*(a for a in ('fsdp', 'expert') if a in over)), over)


def embed(layout: layout_lib.Layout, table: jax.Array, tokens_BT: jax.Array, dtype) -> jax.Array:
  """Rows of the table (this device's W of them, D), for this device's tokens: BTD in `dtype`."""
  mine = words(layout, table, tokens_BT.size, dtype)
  if not mine.over:
    return _rows(mine.kernel, tokens_BT).astype(dtype)
  group_BT = layout.gather(tokens_BT, *mine.tokens_over)
  local_BT = group_BT - mine.first
  here_BT = (local_BT >= 0) & (local_BT < mine.kernel.shape[0])
  rows_BTD = _rows(mine.kernel, jnp.where(here_BT, local_BT, 0))
  rows_BTD = jnp.where(here_BT[..., None], rows_BTD, 0).astype(dtype)
  # Only one device has a token's row: the sum is exact in any dtype.
  return layout.sum(layout.scatter(rows_BTD, *mine.tokens_over), 'tensor')


def _rows(table: jax.Array, tokens: jax.Array) -> jax.Array:
  # In float32, for the gradient: a frequent word's is a sum over a great many tokens.
  return table.astype(jnp.promote_types(table.dtype, jnp.float32))[tokens]


def token_nll(
  layout: layout_lib.Layout, mine: Words, transposed: bool, scale: float, hidden_ND, targets_N
) -> jax.Array:
  """Negative log-likelihood (N,) float32 nats of tokens of a group, whose words lie over devices.

  Args:
    layout: the collectives.
    mine: this device's words, in the compute dtype.
    transposed: whether its kernel is (D, W).
    scale: of the logits.
    hidden_ND: after the final norm, in the compute dtype; the same on all devices of the words.
    targets_N: int32.
  """
  return _scores(layout, mine, transposed, scale, hidden_ND, targets_N)[0]


def _scores(layout, mine, transposed, scale, hidden_ND, targets_N):
  """The tokens' nll, and of this device's words the logits, their maxima and the targets."""
  spec = 'nd,dw->nw' if transposed else 'nd,wd->nw'
  dtype = jnp.promote_types(hidden_ND.dtype, jnp.float32)
  logits_NW = scale * jnp.einsum(spec, hidden_ND, mine.kernel, preferred_element_type=dtype)
  local_N = targets_N - mine.first
  here_N = (local_N >= 0) & (local_N < logits_NW.shape[1])
  index_N1 = jnp.where(here_N, local_N, 0)[:, None]
  picked_N = jnp.where(here_N, jnp.take_along_axis(logits_NW, index_N1, axis=1)[:, 0], 0)
  largest_N = logits_NW.max(1)
  if mine.over:
    largest_N = jax.lax.pmax(largest_N, mine.over)
  total_N = jnp.exp(logits_NW - largest_N[:, None]).sum(1)
  picked_N, total_N = layout.sum((picked_N, total_N), *mine.over)
  logsumexp_N = jnp.log(total_N) + largest_N
  return logsumexp_N - picked_N, logits_NW, logsumexp_N, jnp.where(here_N, local_N, -1)


def nll_sum(
  layout: layout_lib.Layout,
  kernel: jax.Array,
  hidden_BTD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  transposed: bool,
  scale: float,
  chunk: int,
  dtype,
) -> jax.Array:
  """Sum over this device's tokens of weight times negative log-likelihood; float32 nats.

  The gradient is computed together with the value, one chunk of tokens at a time: the logits of a
  chunk exist once, in one pass, and are not computed again. It assumes that the result reaches the
  loss with the same factor on every device, as a sum over devices does.

  Args:
    layout: the collectives.
    kernel: this device's part of the output embedding, (W, D) or (D, W).
    hidden_BTD: this device's, after the final norm.
    targets_BT: int32.
    weights_BT: of the targets.
    transposed: whether the kernel is (D, W).
    scale: of the logits.
    chunk: tokens whose logits exist at once on a device; 0 is all.
    dtype: of the products' operands.
  """
  num_tokens = targets_BT.size
  mine = words(layout, kernel, num_tokens, dtype, transposed)
  movers = [layout.sizes[axis] for axis in mine.tokens_over]
  own = max(1, chunk // functools.reduce(int.__mul__, movers, 1)) if chunk else num_tokens
  own = min(own, num_tokens)
  num_chunks = -(-num_tokens // own)
  spare = num_chunks * own - num_tokens

  def cut(x):
    flat = x.reshape(num_tokens, *x.shape[2:])
    padded = jnp.pad(flat, [(0, spare)] + [(0, 0)] * (flat.ndim - 1))
    return padded.reshape(num_chunks, own, *flat.shape[1:])

  def value(kernel, parts):
    here = mine._replace(kernel=kernel.astype(dtype))

    def one(total, part):
      hidden_ND, targets_N, weights_N = part
      group = [layout.gather(x, *mine.tokens_over) for x in (hidden_ND.astype(dtype), targets_N)]
      nll_N = token_nll(layout, here, transposed, scale, *group)
      return total + jnp.sum(my_part(nll_N) * weights_N), None

    return _over_chunks(one, jnp.zeros((), weights_BT.dtype), parts)[0]

  def my_part(x_N):
    if not mine.tokens_over:
      return x_N
    return jax.lax.dynamic_slice_in_dim(x_N, jax.lax.axis_index(mine.tokens_over) * own, own)

  def value_and_gradients(kernel, hidden, targets, weights):
    here = mine._replace(kernel=kernel.astype(dtype))
    grad_dtype = jnp.promote_types(dtype, jnp.float32)
    to_hidden, to_kernel = ('nw,dw->nd', 'nd,nw->dw') if transposed else ('nw,wd->nd', 'nw,nd->wd')

    def one(carry, part):
      total, grad_kernel = carry
      group = [layout.gather(x, *mine.tokens_over) for x in (part[0].astype(dtype), *part[1:])]
      hidden_ND, targets_N, weights_N = group
      nll_N, logits_NW, logsumexp_N, local_N = _scores(
        layout, here, transposed, scale, hidden_ND, targets_N
      )
      slope_NW = jnp.exp(logits_NW - logsumexp_N[:, None])
      slope_NW -= jax.nn.one_hot(local_N, logits_NW.shape[1], dtype=slope_NW.dtype)
      slope_NW = (scale * weights_N[:, None] * slope_NW).astype(dtype)
      grad_ND = jnp.einsum(to_hidden, slope_NW, here.kernel, preferred_element_type=grad_dtype)
      pair = (hidden_ND, slope_NW) if transposed else (slope_NW, hidden_ND)
      grad_kernel += jnp.einsum(to_kernel, *pair, preferred_element_type=grad_dtype)
      own_ND = layout.scatter(grad_ND.astype(dtype), *mine.tokens_over)
      return (total + jnp.sum(my_part(nll_N) * part[2]), grad_kernel), own_ND

    start = jnp.zeros((), weights.dtype), jnp.zeros(kernel.shape, grad_dtype)
    (total, grad_kernel), grads = _over_chunks(one, start, (hidden, targets, weights))
    return total, (grad_kernel.astype(kernel.dtype), grads.astype(hidden.dtype))

  @jax.custom_vjp
  def run(kernel, hidden, targets, weights):
    return value(kernel, (hidden, targets, weights))

  def backward(gradients, slope):
    # A device's words are in the losses of all the devices that `tensor` gives the same tokens.
    slope *= layout.copies
    return *((slope * x).astype(x.dtype) for x in gradients), None, None

  run.defvjp(value_and_gradients, backward)
  return run(mine.kernel, cut(hidden_BTD), cut(targets_BT), cut(weights_BT))


def _over_chunks(one, carry, parts):
  """A scan over chunks; a single chunk needs no loop."""
  if parts[0].shape[0] > 1:
    return jax.lax.scan(one, carry, parts)
  carry, out = one(carry, jax.tree.map(lambda x: x[0], parts))
  return carry, None if out is None else out[None]
