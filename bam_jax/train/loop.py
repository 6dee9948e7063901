"""Trains one run from its first step, or its newest checkpoint, to its last."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax

from bam_jax import checkpoint, config, errors
from bam_jax.checkpoint import integrity
from bam_jax.data import mixture, shards
from bam_jax.errors import UserError
from bam_jax.model import arithmetic, transformer
from bam_jax.parallel import processes, sharding
from bam_jax.train import (
  evaluation,
  goodput,
  guard,
  metrics,
  optimizer,
  profile,
  record,
  stages,
  stop,
)
from bam_jax.train import step as step_lib
from bam_jax.train import watch as watch_lib
from bam_jax.train.progress import Progress

PREFETCH = 4  # batches made ahead


@dataclass(frozen=True)
class Job:
  """One run with everything decided that its recipe decides."""

  name: str
  run: config.Run
  model: config.Model
  recipe: config.Recipe
  dataset: shards.Dataset
  domains: tuple[str, ...]  # to evaluate
  folder: Path  # of the run
  init: Callable[[Any], transformer.Params]  # from the parameters' shardings
  meta: Callable[[int], checkpoint.Meta]  # of a step


def train(job: Job, progress: Progress, stopping: stop.Flag, began: float) -> dict[str, Any]:
  """Trains to the budget, saves, evaluates.

  Args:
    job: what to train.
    progress: what a person sees.
    stopping: says when to stop.
    began: when the time of this run began, by `time.monotonic`.

  Returns:
    `step`, `tokens`, `wall_seconds`, `time` (seconds by kind of `goodput`), `skipped` (steps),
    `loss` of the last step and `domains`, the held-out results.

  Raises:
    guard.Diverged: a step would do harm, and the run's guard does not skip it.
    stop.Stopped: a signal came; the state is saved.
    UserError: the disk takes no more, or what lies on it is damaged.
  """
  run, recipe, options = job.run, job.recipe, job.recipe.evaluation
  total_steps, step_tokens = recipe.total_steps(job.name), recipe.step_tokens(job.name)
  learning_rate = optimizer.learning_rate(run.schedule, recipe.warmup_steps(job.name), total_steps)
  mesh = sharding.make_mesh(run.mesh)
  train_step = step_lib.train_step(
    job.model,
    run.compute,
    run.loss,
    run.optimizer,
    run.grad_accum_steps,
    mesh,
    stages.of(run),
    run.guard,
  )
  rates = stages.rates(learning_rate, recipe.router_warmup_steps(job.name))
  evaluate = step_lib.evaluation_step(job.model, run.compute, mesh)
  spent = goodput.Goodput(began)

  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    for sentence in integrity.set_aside(job.folder / 'checkpoints'):
      progress.note(sentence)
    checkpoints = checkpoint.Checkpoints(job.folder / 'checkpoints', run.intervals.keep)
    stack.push(lambda kind, error, trace: _close(checkpoints, error))
    batches = mixture.iterate(batches_of(run, recipe, job.dataset), 0, PREFETCH)
    first_step, state, data = _start(job, mesh, checkpoints, batches)
    writer = metrics.Writer(job.folder, first_step)
    stack.callback(writer.close)
    spent.resume(data.get('spent', {}), writer.dropped)
    watch = stack.enter_context(
      watch_lib.Watch(
        job.name, first_step, run.watch.stall_seconds, lambda: spent.kind, progress.note
      )
    )
    skips = guard.Skips(
      job.name, run.guard, checkpoints.newest_folder, tuple(data.get('skipped', (0, 0)))
    )
    recorder = record.Recorder(
      job.name,
      writer,
      progress,
      first_step=first_step,
      total_steps=total_steps,
      spent=spent,
      skips=skips,
      done=watch.done,
      step_tokens=step_tokens,
      flops_per_token=arithmetic.training_flops(job.model, recipe.data.sequence_length),
      num_devices=mesh.size,
      log_every=run.intervals.log,
      learning_rate=learning_rate,
    )
    profiler = profile.Profiler(job.folder / 'profile', run.watch, recorder.settle)
    stack.callback(profiler.close)

    def save(step: int) -> None:
      recorder.settle()
      with spent.spend('checkpoint'):
        data = {
          'iterator': batches.get_state(),
          'history': guard.to_json(state.history),
          'skipped': skips.counts,
          'spent': spent.spent(),
        }
        writer.flush()  # a resume at this step reads back what was told of the steps before
        checkpoints.save(step, state.params, state.opt_state, data, job.meta(step))

    def heldout(tokens: int | None, between: Callable[[], None]) -> dict[str, Any]:
      recorder.settle()
      with spent.spend('evaluate'):
        return evaluation.heldout_nll(
          evaluate, state.params, job.dataset, job.domains, options,
          recipe.data.sequence_length, mesh, tokens, between,
        )  # fmt: skip

    def may_stop() -> None:
      """Between the batches of all held-out text, which may be long; by then the state is saved."""
      watch.goes_on()
      if signum := stopping.agreed():
        raise stop.Stopped(signum)

    stack.enter_context(spent.spend('step'))
    for step in range(first_step + 1, total_steps + 1):
      profiler.before(step)
      with spent.spend('data'):
        batch = sharding.put_batch(mixture.model_inputs(next(batches)), mesh)
      with spent.spend('step' if step > first_step + 1 else 'compile'):
        state, step_metrics = train_step(state, batch, rates(step - 1))
      recorder.step(step, step_metrics)
      profiler.after(step)
      if step == total_steps:
        break
      if _due(step, run.intervals.evaluate):
        recorder.valid(step, evaluation.nats_per_token(heldout(options.tokens, watch.goes_on)))
      signum = stopping.agreed()
      if _due(step, run.intervals.checkpoint) or signum:
        save(step)
      if signum:
        raise stop.Stopped(signum)

    if checkpoints.latest() != total_steps:
      save(total_steps)
    # The curve's last point is over the text of all its points; the result is over everything.
    recorder.valid(total_steps, evaluation.nats_per_token(heldout(options.tokens, may_stop)))
    domains = heldout(None, may_stop)
    with spent.spend('checkpoint'):
      checkpoints.wait()
    return {
      'step': total_steps,
      'tokens': total_steps * step_tokens,
      'wall_seconds': spent.seconds,
      'time': spent.spent(),
      'skipped': skips.total,
      'loss': recorder.loss,
      'domains': domains,
    }


def _close(checkpoints: checkpoint.Checkpoints, error: BaseException | None) -> None:
  # What is being written cannot be finished without a process that was lost.
  if jax.process_count() > 1 and errors.of_jax(error):
    return
  try:
    checkpoints.close()
  except UserError:
    if not isinstance(error, UserError):  # of a full disk one sentence is enough
      raise


def _start(
  job: Job, mesh: jax.sharding.Mesh, checkpoints: checkpoint.Checkpoints, batches: Any
) -> tuple[int, step_lib.State, dict[str, Any]]:
  """Steps done before, the state after them, and what was saved beside it."""
  abstract = step_lib.abstract_state(job.model, job.run.compute, job.run.optimizer, mesh)
  first_step = checkpoints.latest()
  if first_step is None:
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    params = job.init(shardings.params)
    adamw = optimizer.adamw(job.run.optimizer)
    opt_state = jax.jit(adamw.init, out_shardings=shardings.opt_state)(params)
    first_step, data = 0, {}
  else:
    params, opt_state, data = checkpoints.restore(first_step, abstract.params, abstract.opt_state)
    batches.set_state(data['iterator'])
  history = guard.history(job.run.guard, data.get('history'))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  history = processes.put(history, jax.tree.map(lambda _: everywhere, history))
  return first_step, step_lib.State(params, opt_state, history), data


def batches_of(
  run: config.Run, recipe: config.Recipe, dataset: shards.Dataset
) -> grain.MapDataset[mixture.Batch]:
  """The training batches of a run, by step; this process's rows of each."""
  part, parts = processes.share_of_batch(sharding.make_mesh(run.mesh))
  return mixture.batches(
    {domain: dataset.documents(domain, 'train') for domain in run.data},
    run.data,
    sequence_length=recipe.data.sequence_length,
    batch_size=run.batch_size,
    # One number from both: runs of one recipe with one data seed read alike.
    seed=recipe.seed * 1_000_003 + run.data_seed,
    process_index=part,
    process_count=parts,
  )


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0
