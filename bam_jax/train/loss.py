"""The training objective: negative log-likelihood, and the routers' losses beside it.

Legend: B batch, T sequence, D model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bam_jax import config
from bam_jax.model import block, router, transformer


class Metrics(NamedTuple):
  """Sums over a batch: those of batches and micro-batches add up."""

  nll: jax.Array  # nats, over the targets that count
  targets: jax.Array  # that count, int32
  routing: block.Routing


def nll(network: transformer.Network, params: transformer.Params, batch: dict) -> Metrics:
  """Sums of the batch: `tokens, targets, segments, positions` (B, T) int32, `weights` (B, T)."""
  inputs = batch['tokens'], batch['segments'], batch['positions']
  hidden_BTD, routing = network.hidden(params, *inputs)
  total = network.nll_sum(params, hidden_BTD, batch['targets'], batch['weights'])
  return Metrics(total, jnp.sum(batch['weights'] > 0, dtype=jnp.int32), routing)


def totals(network: transformer.Network, batch: dict) -> tuple[jax.Array, jax.Array]:
  """A batch's targets that count, and its real tokens, int32, over all devices."""
  targets = jnp.sum(batch['weights'] > 0, dtype=jnp.int32)  # a sum in float32 ends at 2^24
  tokens = jnp.sum(batch['segments'] > 0, dtype=jnp.int32)
  return network.layout.total((targets, tokens))


def objective(
  network: transformer.Network,
  loss: config.Loss,
  params: transformer.Params,
  batch: dict,
  step: tuple[jax.Array, jax.Array] | None = None,
  whole: block.Routing | None = None,
) -> tuple[jax.Array, Metrics]:
  """The loss and the metrics of a batch, or of a micro-batch.

  On a mesh the loss is this device's contribution, and the devices' losses add up to the step's;
  metrics are sums over this device's rows. Micro-batches' losses add up too, if given the totals of
  the whole step and, when router losses cover the whole step, its routing, `whole`.
  """
  layout, metrics = network.layout, nll(network, params, batch)
  here = totals(network, batch)
  step_targets, step_tokens = step or here
  over = layout.total(jax.lax.stop_gradient(metrics.routing)) if whole is None else whole
  routers = router_loss(network.model, loss, metrics.routing, over)
  if whole is None:  # means over this micro-batch's tokens, weighted by its share of the step's
    routers *= here[1] / jnp.maximum(step_tokens, 1)
  value = metrics.nll / jnp.maximum(step_targets, 1) + routers
  return value / layout.copies, metrics


def router_loss(
  model: config.Model, loss: config.Loss, routing: block.Routing, whole: block.Routing
) -> jax.Array:
  """`alpha L_LB + beta L_z` over layers and routers; soft attention has no load to balance.

  The gradient flows into `routing`, of the tokens at hand; `whole` is of all the tokens that the
  losses are over, those at hand among them.
  """
  total = jnp.zeros(())
  if routing.ffn is not None:
    total += loss.router_z * router.router_z(routing.ffn, whole.ffn)
    total += loss.load_balance * router.load_balance(routing.ffn, whole.ffn)
  if routing.attention is not None:
    total += loss.router_z * router.router_z(routing.attention, whole.attention)
    if model.attention_experts.top_k:
      total += loss.load_balance * router.load_balance(routing.attention, whole.attention)
  return total
