"""The training objective: negative log-likelihood, and the routers' losses beside it.

Legend: B batch, T sequence, D model, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bam_jax import config
from bam_jax.model import block, router, transformer


class Metrics(NamedTuple):
  """Sums over a batch, so that batches and micro-batches add up."""

  nll: jax.Array  # nats, over the targets that count
  targets: jax.Array  # targets that count
  routing: block.Routing


def token_nll(
  network: transformer.Network, params: transformer.Params, hidden_BTD, targets_BT
) -> jax.Array:
  """Negative log-likelihood of every target, (B, T) float32 nats."""
  logits_BTV = network.logits(params, hidden_BTD)
  picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT


def nll(network: transformer.Network, params: transformer.Params, batch: dict) -> Metrics:
  """Sums of the batch: `tokens, targets, segments, positions` (B, T) int32, `weights` (B, T)."""
  hidden_BTD, routing = network.hidden(
    params, batch['tokens'], batch['segments'], batch['positions']
  )
  total = _weighted_nll(network, params, hidden_BTD, batch['targets'], batch['weights'])
  return Metrics(total, batch['weights'].sum(), routing)


def objective(network: transformer.Network, loss: config.Loss) -> Callable:
  """The function `(params, batch, targets=None, whole=None) -> (loss, Metrics)`.

  `targets` is the number of targets of the whole step when `batch` is one micro-batch of it: the
  micro-batches' losses then add up to the step's, each weighted by the targets it holds.
  `whole` is the routing of the whole step, where routers' losses are over all of it: loads and
  token counts are then the step's, and what the micro-batches contribute adds up as well.
  """

  def run(params, batch, targets=None, whole=None):
    metrics = nll(network, params, batch)
    targets = jnp.maximum(metrics.targets if targets is None else targets, 1)
    if whole is None:
      share = metrics.targets / targets
      routers = share * router_loss(network.model, loss, metrics.routing, metrics.routing)
    else:
      routers = router_loss(network.model, loss, metrics.routing, whole)
    return metrics.nll / targets + routers, metrics

  return run


def router_loss(
  model: config.Model, loss: config.Loss, routing: block.Routing, whole: block.Routing
) -> jax.Array:
  """`alpha L_LB + beta L_z` over layers and routers; soft attention has no load to balance.

  Args:
    model: says which routers there are.
    loss: the weights.
    routing: what the tokens at hand did; the gradient flows into it.
    whole: of all the tokens that the losses are over, those at hand among them.
  """
  total = jnp.zeros(())
  attention = model.attention_experts
  routers = [
    (routing.ffn, whole.ffn, model.ffn_experts is not None),
    (routing.attention, whole.attention, attention is not None and attention.top_k > 0),
  ]
  for stats, over, balanced in routers:
    if stats is None:
      continue
    total += loss.router_z * router.router_z(stats, over)
    if balanced:
      total += loss.load_balance * router.load_balance(stats, over)
  return total


def _weighted_nll(network, params, hidden_BTD, targets_BT, weights_BT) -> jax.Array:
  """Sum of `weights * nll`, holding the logits of one chunk of tokens at a time."""

  def chunk_nll(hidden, targets, weights):
    return jnp.sum(token_nll(network, params, hidden, targets) * weights)

  chunk = network.compute.loss_chunk
  num_tokens = targets_BT.size
  if not chunk or chunk >= num_tokens:
    return chunk_nll(hidden_BTD, targets_BT, weights_BT)
  num_chunks = -(-num_tokens // chunk)
  spare = num_chunks * chunk - num_tokens

  def cut(x):
    flat = x.reshape(num_tokens, *x.shape[2:])
    padded = jnp.pad(flat, [(0, spare)] + [(0, 0)] * (flat.ndim - 1))
    return padded.reshape(num_chunks, chunk, *flat.shape[1:])

  def body(total, parts):
    return total + jax.checkpoint(chunk_nll)(*parts), None

  total, _ = jax.lax.scan(
    body, jnp.zeros((), weights_BT.dtype), (cut(hidden_BTD), cut(targets_BT), cut(weights_BT))
  )
  return total
