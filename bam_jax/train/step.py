"""One optimizer step and one evaluation step, jitted and sharded."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.model import transformer
from bam_jax.parallel import sharding
from bam_jax.train import balance
from bam_jax.train import guard as guard_lib
from bam_jax.train import loss as loss_lib
from bam_jax.train import optimizer as optimizer_lib
from bam_jax.train import stages as stages_lib


class State(NamedTuple):
  """What a step reads and replaces; its buffers are donated."""

  params: transformer.Params
  opt_state: Any
  history: guard_lib.History | tuple[()] = ()


class StepMetrics(NamedTuple):
  """What a step reports."""

  loss: jax.Array  # the objective, nats and routers' losses
  gradient_norm: jax.Array  # before clipping
  sums: loss_lib.Metrics
  spike: jax.Array | None = None  # whether it was one, if the guard asks


def abstract_state(
  model: config.Model, compute: config.Compute, optimizer: config.Optimizer, mesh: jax.sharding.Mesh
) -> State:
  """Shapes, dtypes and shardings of a run's state, between two steps."""
  params = transformer.Network(model, compute).abstract()
  state = State(params, jax.eval_shape(optimizer_lib.adamw(optimizer).init, params))
  shardings = sharding.tree(state, mesh)
  if compute.offload_optimizer:
    shardings = shardings._replace(opt_state=sharding.on_host(shardings.opt_state))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
  )


@functools.lru_cache(maxsize=8)
def train_step(
  model: config.Model,
  compute: config.Compute,
  loss: config.Loss,
  optimizer: config.Optimizer,
  grad_accum_steps: int,
  mesh: jax.sharding.Mesh,
  stages: stages_lib.Stages = stages_lib.Stages(),  # noqa: B008
  guard: config.Guard = config.Guard(),  # noqa: B008
) -> Callable[[State, dict, Any], tuple[State, StepMetrics]]:
  """The jitted step `(state, batch, learning_rate) -> (state, metrics)`.

  Cached, so that runs which differ in data, schedule or initial parameters compile once. What
  `learning_rate` is, `stages.rates` says.
  """
  network = transformer.Network(model, compute, mesh)
  gradients = spread_gradients(network, loss, grad_accum_steps)
  adamw = optimizer_lib.adamw(optimizer)
  learnable, learn = stages_lib.learnable(stages), stages_lib.learner(stages)
  move_bias = balance.bias_update(model, loss, stages)
  abstract = abstract_state(model, compute, optimizer, mesh)
  judge = guard_lib.judge(guard)
  fetch = _fetcher(compute, sharding.tree(abstract.opt_state, mesh))
  everywhere = jax.sharding.NamedSharding(mesh, P())
  shardings = jax.tree.map(lambda x: x.sharding, abstract)._replace(history=everywhere)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, everywhere))
  def step(state: State, batch: dict, learning_rate) -> tuple[State, StepMetrics]:
    (loss_value, sums), grads = gradients(state.params, batch)
    grads = learnable(grads)
    norm = optax.tree.norm(grads)
    before = state._replace(opt_state=fetch(state.opt_state))
    updates, opt_state = adamw.update(grads, before.opt_state, before.params)
    params = move_bias(learn(before.params, updates, learning_rate), sums.routing)
    after = before._replace(params=params, opt_state=opt_state)
    state, spike = judge(before, after, loss_value, norm)
    return state, StepMetrics(loss_value, norm, sums, spike)

  return step


def _fetcher(compute: config.Compute, shardings: Any) -> Callable[[Any], Any]:
  """What brings the optimizer's state to the devices for its update."""
  if not compute.offload_optimizer:
    return lambda opt_state: opt_state
  return lambda opt_state: jax.device_put(opt_state, shardings)


@functools.lru_cache(maxsize=8)
def evaluation_step(
  model: config.Model, compute: config.Compute, mesh: jax.sharding.Mesh
) -> Callable[[transformer.Params, dict], loss_lib.Metrics]:
  """The jitted `(params, batch) -> sums of the rows of each device`, along a first axis.

  They are not added up here: in which order a network adds is not for us to say.
  """
  network = transformer.Network(model, compute, mesh)
  layout = network.layout

  def sums(params, batch):
    return jax.tree.map(lambda x: x[None], loss_lib.nll(network, params, batch))

  specs = layout.specs(network.abstract()), sharding.BATCH
  everywhere = jax.sharding.NamedSharding(mesh, P())
  return jax.jit(layout.spread(sums, specs, sharding.BATCH), out_shardings=everywhere)


def spread_gradients(
  network: transformer.Network, loss: config.Loss, grad_accum_steps: int
) -> Callable:
  """The function `(params, batch) -> ((loss, sums), gradients)` of global arrays."""
  layout = network.layout
  gradients = jax.value_and_grad(loss_lib.objective(network, loss), has_aux=True)
  if grad_accum_steps > 1:
    gradients = _accumulated(gradients, grad_accum_steps, network, loss)

  def run(params, batch):
    (value, sums), grads = gradients(params, batch)
    value = layout.sum(value, *sharding.AXES)
    return (value, layout.total(sums)), layout.gradient_sums(grads)

  specs = layout.specs(network.abstract())
  return layout.spread(run, (specs, sharding.BATCH), ((P(), P()), specs))


def _accumulated(
  gradient: Callable, grad_accum_steps: int, network: transformer.Network, loss: config.Loss
) -> Callable:
  """`gradient` over micro-batches: sums over the step's targets, divided once."""
  whole_step = balance.whole_step(network, loss)

  def run(params, batch):
    targets = network.layout.total(batch['weights'].sum())
    # Micro-batch i takes every row i modulo `grad_accum_steps`, on every mesh the same rows.
    micro = jax.tree.map(
      lambda x: x.reshape(-1, grad_accum_steps, *x.shape[1:]).swapaxes(0, 1), batch
    )
    whole = whole_step(params, micro)

    def body(total, part):
      return jax.tree.map(jnp.add, total, gradient(params, part, targets, whole)), None

    first = gradient(params, jax.tree.map(lambda x: x[0], micro), targets, whole)
    total, _ = jax.lax.scan(body, first, jax.tree.map(lambda x: x[1:], micro))
    return total

  return run
