"""The model's two ends, whose arrays have a row for every word and are never whole on a device.

`tensor` and `expert` cut the vocabulary: a token's row is read where it lies, and the scores of all
words are computed where the words lie, for the tokens of the whole group. Over `fsdp` whichever is
less moves: the tokens to the words or the words to the tokens.

With `embedding_rank` r each of E experts has its own embeddings, up to a difference of rank r from
what they share: `table + sum_e g_e A_e B_e`, A_e (V, r), B_e (r, D). Columns D, D + 1, ... of the
table are A_1, A_2, ..., and the B_e lie below each other in `directions`. One router gives the
gates of both ends. It reads what the first layer's attention would without the differences. Scores
are still one product: of `[h, g_1 h B_1^T, ...]` with the table.

Legend: B batch, T sequence, D model, V vocabulary, N tokens, W words of this device, X = E r.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bam_jax import config
from bam_jax.model import activation, norm, router
from bam_jax.model.rope import Tokens
from bam_jax.parallel.collectives import Layout


class Words(NamedTuple):
  """This device's words, and where the others are."""

  kernel: jax.Array  # (W, D), or (D, W) when transposed
  first: jax.Array | int  # the number of the first of them
  tokens_over: tuple[str, ...]  # axes along which tokens move to the words
  over: tuple[str, ...]  # axes along which the words lie


def local_words(
  layout: Layout, kernel: jax.Array, num_tokens: int, dtype, transposed: bool = False
) -> Words:
  """This device's words, or those of its `fsdp` group if that moves less than moving its tokens.

  `kernel` is this device's part, (W, D) or transposed; words travel in `dtype`.
  """
  axis = 1 if transposed else 0
  fsdp, expert = layout.sizes['fsdp'], layout.sizes['expert']
  tokens_move = num_tokens * expert <= kernel.shape[axis]  # either would be sent fsdp - 1 times
  over = layout.over('tensor', 'expert', *(('fsdp',) if tokens_move else ()))
  if fsdp > 1 and not tokens_move:
    kernel = layout.gather(kernel.astype(dtype), 'fsdp', dimension=axis)
  # In the order of sharding.VOCABULARY, fsdp innermost.
  first = kernel.shape[axis] * jax.lax.axis_index(over) if over else 0
  return Words(kernel, first, layout.over(*(a for a in ('fsdp', 'expert') if a in over)), over)


def embed(layout: Layout, table: jax.Array, tokens_BT: jax.Array, dtype) -> jax.Array:
  """Rows of the table (this device's W of them, D) for this device's tokens: BTD in `dtype`."""
  words = local_words(layout, table, tokens_BT.size, dtype)
  # In float32, for the gradient: a frequent word's is a sum over a great many tokens.
  table = words.kernel.astype(jnp.promote_types(words.kernel.dtype, jnp.float32))
  if not words.over:
    return table[tokens_BT].astype(dtype)
  local_BT = layout.gather(tokens_BT, *words.tokens_over) - words.first
  here_BT = (local_BT >= 0) & (local_BT < table.shape[0])
  rows_BTD = table[jnp.where(here_BT, local_BT, 0)]
  rows_BTD = jnp.where(here_BT[..., None], rows_BTD, 0).astype(dtype)
  # One device alone has a token's row: the sum is exact in any dtype.
  return layout.sum(layout.scatter(rows_BTD, *words.tokens_over), 'tensor')


def mixed(
  model: config.Model,
  rows_BTX: jax.Array,
  embed: dict,
  first_norm: dict | None,
  tokens: Tokens,
  sum_BE: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Embeddings with the experts' differences, BTD, and the gates of those, BTX, float32.

  Args:
    model: with an `embedding_rank`.
    rows_BTX: rows of the table, of D + X columns.
    embed: `router` and `directions`.
    first_norm: parameters of the first layer's norm before attention; None: it has none.
    tokens: metadata of the same tokens.
    sum_BE: see `router.gates`, which also returns it.
  """
  x_BTD, words_BTX = rows_BTX[..., : model.d_model], rows_BTX[..., model.d_model :]
  y_BTD = norm.normalize(model, x_BTD, **first_norm) if first_norm else x_BTD
  gates_BTE, _, sum_BE = router.gates(model, y_BTD, embed['router'], tokens, sum_BE)
  *_, chosen_BTE = router.top_k(gates_BTE, model.ffn_experts.top_k, False)
  gates_BTE *= chosen_BTE
  if model.ffn_experts.renormalize:
    gates_BTE /= gates_BTE.sum(-1, keepdims=True)
  gates_BTX = jnp.repeat(gates_BTE, model.embedding_rank, axis=-1)
  words_BTX *= gates_BTX.astype(x_BTD.dtype)
  return x_BTD + words_BTX @ embed['directions'].astype(x_BTD.dtype), gates_BTX, sum_BE


def widened(hidden_BTD, gates_BTX, directions_XD: jax.Array, dtype) -> jax.Array:
  """What the output embedding multiplies, (..., D + X): `[h, g_1 h B_1^T, ...]`."""
  products_BTX = jnp.einsum(
    '...d,xd->...x',
    hidden_BTD.astype(dtype),
    directions_XD.astype(dtype),
    preferred_element_type=hidden_BTD.dtype,
  )
  return jnp.concatenate([hidden_BTD, gates_BTX * products_BTX], -1)


def scores(model: config.Model, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
  """Scores of words (..., W): float32 sums of products in the arguments' dtype, scaled, capped."""
  spec = '...d,wd->...w' if model.tied_embeddings else '...d,dw->...w'
  dtype = jnp.promote_types(hidden.dtype, jnp.float32)
  logits = model.logit_scale * jnp.einsum(spec, hidden, kernel, preferred_element_type=dtype)
  return activation.capped(logits, model.logit_cap)


def nll_sum(
  layout: Layout,
  model: config.Model,
  compute: config.Compute,
  kernel: jax.Array,
  hidden_BTD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
) -> jax.Array:
  """Sum over this device's tokens of weight times negative log-likelihood; float32 nats.

  The gradient is computed together with the value, one chunk of tokens at a time: the logits of a
  chunk exist once, in one pass, and are not recomputed. It assumes that the result reaches the loss
  with the same factor on every device, as in a sum over devices.

  Args:
    layout: the collectives.
    model: scales the logits, and caps them.
    compute: the dtype of the products' operands, and the chunk.
    kernel: this device's part of the output embedding, (W, D) if it is tied, else (D, W).
    hidden_BTD: after the final norm.
    targets_BT: int32.
    weights_BT: float32.
  """
  num_tokens, chunk, dtype = targets_BT.size, compute.loss_chunk, jnp.dtype(compute.dtype)
  words = local_words(layout, kernel, num_tokens, dtype, not model.tied_embeddings)
  senders = math.prod(layout.sizes[axis] for axis in words.tokens_over)
  rows = min(max(1, chunk // senders), num_tokens) if chunk else num_tokens  # own ones of a chunk
  num_chunks = -(-num_tokens // rows)

  def cut(x):
    flat = x.reshape(num_tokens, *x.shape[2:])
    spare = num_chunks * rows - num_tokens
    padded = jnp.pad(flat, [(0, spare)] + [(0, 0)] * (flat.ndim - 1))
    return padded.reshape(num_chunks, rows, *flat.shape[1:])

  def gather(x):
    return layout.gather(x, *words.tokens_over)

  def own(x_N):
    if not words.tokens_over:
      return x_N
    return jax.lax.dynamic_slice_in_dim(x_N, jax.lax.axis_index(words.tokens_over) * rows, rows)

  def sweep(gradients: bool, kernel, hidden, targets, weights):
    """The sum and, if wanted, its gradients to kernel and hidden."""
    here = words._replace(kernel=kernel.astype(dtype))
    grad_dtype = jnp.promote_types(dtype, jnp.float32)

    def one(carry, part):
      total, d_kernel = carry
      hidden_ND, targets_N, weights_N = map(gather, (part[0].astype(dtype), *part[1:]))
      nll_N, logits_NW, logsumexp_N, local_N = _scores(layout, model, here, hidden_ND, targets_N)
      total += jnp.sum(own(nll_N) * part[2])
      if not gradients:
        return (total, None), None
      d_logits_NW = jnp.exp(logits_NW - logsumexp_N[:, None])
      d_logits_NW -= jax.nn.one_hot(local_N, logits_NW.shape[1], dtype=d_logits_NW.dtype)
      if model.logit_cap:
        d_logits_NW *= activation.derivative(logits_NW, model.logit_cap)
      d_logits_NW = (model.logit_scale * weights_N[:, None] * d_logits_NW).astype(dtype)
      einsum = partial(jnp.einsum, preferred_element_type=grad_dtype)
      if model.tied_embeddings:
        d_hidden_ND = einsum('nw,wd->nd', d_logits_NW, here.kernel)
        d_kernel += einsum('nw,nd->wd', d_logits_NW, hidden_ND)
      else:
        d_hidden_ND = einsum('nw,dw->nd', d_logits_NW, here.kernel)
        d_kernel += einsum('nd,nw->dw', hidden_ND, d_logits_NW)
      d_hidden_ND = layout.scatter(d_hidden_ND.astype(dtype), *words.tokens_over)
      return (total, d_kernel), d_hidden_ND

    carry = jnp.zeros((), weights.dtype), jnp.zeros(kernel.shape, grad_dtype) if gradients else None
    (total, d_kernel), d_hidden = _over_chunks(one, carry, (hidden, targets, weights))
    if not gradients:
      return total
    return total, (d_kernel.astype(kernel.dtype), d_hidden.astype(hidden.dtype))

  def backward(gradients, cotangent):
    # A device's words are in the losses of all the devices that `tensor` gives the same tokens.
    cotangent *= layout.copies
    return *((cotangent * x).astype(x.dtype) for x in gradients), None, None

  total = jax.custom_vjp(partial(sweep, False))
  total.defvjp(partial(sweep, True), backward)
  return total(words.kernel, cut(hidden_BTD), cut(targets_BT), cut(weights_BT))


def _scores(layout: Layout, model: config.Model, words: Words, hidden_ND, targets_N):
  """Tokens' negative log-likelihood, this device's logits, all words' logsumexp, local targets.

  A local target is a number among this device's words, or -1 where the word is another's.
  """
  logits_NW = scores(model, hidden_ND, words.kernel)
  local_N = targets_N - words.first
  here_N = (local_N >= 0) & (local_N < logits_NW.shape[1])
  index_N1 = jnp.where(here_N, local_N, 0)[:, None]
  picked_N = jnp.where(here_N, jnp.take_along_axis(logits_NW, index_N1, axis=1)[:, 0], 0)
  largest_N = logits_NW.max(1)
  if words.over:
    largest_N = jax.lax.pmax(largest_N, words.over)
  total_N = jnp.exp(logits_NW - largest_N[:, None]).sum(1)
  picked_N, total_N = layout.sum((picked_N, total_N), *words.over)
  logsumexp_N = jnp.log(total_N) + largest_N
  return logsumexp_N - picked_N, logits_NW, logsumexp_N, jnp.where(here_N, local_N, -1)


def _over_chunks(one, carry, parts):
  """A scan over chunks; a single chunk needs no loop."""
  if len(parts[0]) > 1:
    return jax.lax.scan(one, carry, parts)
  carry, out = one(carry, jax.tree.map(lambda x: x[0], parts))
  return carry, None if out is None else out[None]
