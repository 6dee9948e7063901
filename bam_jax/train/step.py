"""One optimizer step and one evaluation step, jitted and sharded."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.model import block, transformer
from bam_jax.parallel import sharding
from bam_jax.parallel.collectives import Layout
from bam_jax.train import guard as guard_lib
from bam_jax.train import loss as loss_lib
from bam_jax.train import optimizer as optimizer_lib


class State(NamedTuple):
  """What a step reads and replaces; its buffers are donated."""

  params: transformer.Params
  opt_state: Any


class StepMetrics(NamedTuple):
  """What a step reports."""

  loss: jax.Array  # the objective: nats and the routers' losses
  gradient_norm: jax.Array  # before clipping
  sums: loss_lib.Metrics


def abstract_state(
  model: config.Model, compute: config.Compute, optimizer: config.Optimizer, mesh: jax.sharding.Mesh
) -> State:
  """Shapes, dtypes and shardings of a run's state, between two steps."""
  params = transformer.Network(model, compute).abstract()
  state = State(params, jax.eval_shape(optimizer_lib.adamw(optimizer).init, params))
  return sharding.abstract(state, sharding.tree(state, mesh))


@functools.lru_cache(maxsize=8)
def train_step(
  model: config.Model,
  compute: config.Compute,
  loss: config.Loss,
  optimizer: config.Optimizer,
  grad_accum_steps: int,
  mesh: jax.sharding.Mesh,
  factors: optimizer_lib.Factors = (),
  guard: config.Guard = config.Guard(),  # noqa: B008
  only_new: bool = False,
) -> Callable[[State, dict, jax.Array], tuple[State, StepMetrics]]:
  """The jitted `(state, batch, optimizer.learning_rates) -> (state, metrics)`.

  Cached: runs that differ in data, schedule or initial parameters compile once.
  """
  network = transformer.Network(model, compute, mesh)
  adamw = optimizer_lib.adamw(optimizer)
  abstract, replicated = abstract_state(model, compute, optimizer, mesh), NamedSharding(mesh, P())
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  expert_bias_update_rate = loss.expert_bias_update_rate
  expert_bias_update_rate *= optimizer_lib.factor('blocks/ffn/expert_bias', factors)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, replicated))
  def step(state: State, batch: dict, learning_rates: jax.Array) -> tuple[State, StepMetrics]:
    (loss_value, sums), grads = gradients(network, loss, grad_accum_steps, state.params, batch)
    grads = optimizer_lib.freeze(grads, factors)
    if only_new:
      grads = optimizer_lib.of_new_expert(jax.tree.map(jnp.zeros_like, grads), grads)
    norm = optax.tree.norm(grads)
    updates, opt_state = adamw.update(grads, state.opt_state, state.params)
    params = optimizer_lib.apply_updates(state.params, updates, learning_rates, factors)
    if only_new:
      params = optimizer_lib.of_new_expert(state.params, params)
    if model.ffn_experts and model.ffn_experts.expert_bias and expert_bias_update_rate:
      ffn, update = params['blocks']['ffn'], optimizer_lib.update_expert_bias
      bias_LE = update(ffn['expert_bias'], sums.routing.ffn.load, expert_bias_update_rate)
      params['blocks']['ffn'] = ffn | {'expert_bias': bias_LE}
    after = guard_lib.select(guard, state, State(params, opt_state), loss_value, norm)
    return after, StepMetrics(loss_value, norm, sums)

  return step


@functools.lru_cache(maxsize=8)
def evaluation_step(
  model: config.Model, compute: config.Compute, mesh: jax.sharding.Mesh
) -> Callable[[transformer.Params, dict], loss_lib.Metrics]:
  """The jitted `(params, batch) -> sums`, for each device: their sum has no fixed order."""
  # As `evaluate` scores: what a token gets must not depend on its neighbours.
  network = transformer.Network(model.dropless(), compute, mesh)

  def sums(params, batch):
    return jax.tree.map(lambda x: x[None], loss_lib.nll(network, params, batch))

  specs = sharding.specs(network.abstract()), sharding.BATCH
  spread = network.layout.spread(sums, specs, sharding.BATCH)
  return jax.jit(spread, out_shardings=NamedSharding(mesh, P()))


def gradients(
  network: transformer.Network, loss: config.Loss, grad_accum_steps: int, params: dict, batch: dict
) -> tuple[tuple[jax.Array, loss_lib.Metrics], dict]:
  """`((loss, sums), gradients)` of global arrays, over `grad_accum_steps` micro-batches."""
  layout = network.layout

  def local(params, batch):
    gradient = jax.value_and_grad(loss_lib.objective, argnums=2, has_aux=True)
    gradient = functools.partial(gradient, network, loss, params)
    if grad_accum_steps == 1:
      (value, sums), grads = gradient(batch)
    else:
      totals = loss_lib.totals(network, batch)
      micro = micro_batches(layout, batch, grad_accum_steps)
      whole = None
      if loss.balance_over == 'global_batch' and network.model != network.model.dense():
        whole = _whole_routing(network, params, micro)

      def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(part, totals, whole)), None

      first, rest = (jax.tree.map(lambda x, at=at: x[at], micro) for at in (0, slice(1, None)))
      ((value, sums), grads), _ = jax.lax.scan(add, gradient(first, totals, whole), rest)
    value = layout.sum(value, *sharding.AXES)
    return (value, layout.total(sums)), layout.gradient_sums(grads)

  specs = sharding.specs(network.abstract())
  return layout.spread(local, (specs, sharding.BATCH), ((P(), P()), specs))(params, batch)


def micro_batches(layout: Layout, batch: dict, count: int) -> dict:
  """A device's rows in `count` parts, on axis 0; each part has the same rows on every mesh.

  The domains of a batch take turns, so that every `count`-th row might be of one of them: each
  group of `count` rows is dealt to the parts in an order of its own.
  """
  axes = layout.over(*sharding.BATCH[0])
  groups = len(batch['tokens']) // count
  all_groups = groups * math.prod(layout.sizes[axis] for axis in axes)
  order = np.random.default_rng(0).permuted(np.tile(np.arange(count), (all_groups, 1)), axis=1)
  first = groups * jax.lax.axis_index(axes) if axes else 0
  order = jax.lax.dynamic_slice_in_dim(jnp.asarray(order), first, groups)

  def split(x):
    grouped = x.reshape(groups, count, *x.shape[1:])
    return grouped[jnp.arange(groups)[:, None], order].swapaxes(0, 1)

  return jax.tree.map(split, batch)


def _whole_routing(network: transformer.Network, params: dict, micro: dict) -> block.Routing:
  """The routing of all micro-batches, for routers' losses over the whole step.

  Balancing micro-batch by micro-batch punishes experts of domains for what they are meant for;
  arXiv 2501.11873. This is one more forward pass, a third more work in the blocks.
  """

  def forward(carry, part):
    inputs = part['tokens'], part['segments'], part['positions']
    return carry, network.hidden(params, *inputs)[1]

  _, routing = jax.lax.scan(forward, None, micro)
  return network.layout.total(jax.tree.map(lambda x: x.sum(0), routing))
