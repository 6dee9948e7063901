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


def nll(network: transformer.Network, params: transformer.Params, batch: dict) -> Metrics:
  """Sums of the batch: `tokens, targets, segments, positions` (B, T) int32, `weights` (B, T)."""
  hidden_BTD, routing = network.hidden(
    params, batch['tokens'], batch['segments'], batch['positions']
  )
  total = network.nll_sum(params, hidden_BTD, batch['targets'], batch['weights'])
  return Metrics(total, batch['weights'].sum(), routing)


def objective(network: transformer.Network, loss: config.Loss) -> Callable:
  """The function `(params, batch, targets=None, whole=None) -> (loss, Metrics)`.

  `targets` is the number of targets of the whole step when `batch` is one micro-batch of it: the
  micro-batches' losses then add up to the step's, each weighted by the targets it holds.
  `whole` is the routing of the whole step, where routers' losses are over all of it: loads and
  token counts are then the step's, and what the micro-batches contribute adds up as well.

  On a mesh the loss is what a device contributes, so that the devices' losses add up to the step's;
  metrics are sums over this device's rows.
  """

  layout = network.layout

  def run(params, batch, targets=None, whole=None):
    metrics = nll(network, params, batch)
    here = layout.total(metrics.targets)
    targets = jnp.maximum(here if targets is None else targets, 1)
    if whole is None:
      over = layout.total(jax.lax.stop_gradient(metrics.routing))
      routers = here / targets * router_loss(network.model, loss, metrics.routing, over)
    else:
      routers = router_loss(network.model, loss, metrics.routing, whole)
    return (metrics.nll / targets + routers) / layout.copies, metrics

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
