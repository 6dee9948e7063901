"""Trains one run from its first step, or its newest checkpoint, to its last."""

import contextlib
import faulthandler
import sys
import threading
from collections.abc import Callable
from typing import Any

import grain
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bam_jax import checkpoint, config, errors
from bam_jax.checkpoint import integrity
from bam_jax.data import mixture, store
from bam_jax.errors import UserError
from bam_jax.parallel import processes, sharding
from bam_jax.train import guard, heldout, log, optimizer, stop, timing
from bam_jax.train import hooks as hooks_lib
from bam_jax.train import step as step_lib
from bam_jax.train.job import Job


def train(job: Job, stopping: stop.Flag, began: float) -> dict[str, Any]:
  """Trains to the budget, saves, evaluates; returns what `result.json` is to hold of it.

  The time of this run began at `began`, by `time.monotonic`.

  Raises:
    stop.Stopped: a signal came; the state is saved.
    UserError: a step would do harm, the disk is full, or what is on it is damaged.
  """
  name, run, recipe = job.name, job.run, job.recipe
  total_steps, mesh = recipe.total_steps(name), sharding.make_mesh(run.mesh)
  replicated = NamedSharding(mesh, P())
  train_step = step_lib.train_step(
    job.model, run.compute, run.loss, run.optimizer, run.grad_accum_steps, mesh,
    optimizer.factors_of(run), run.guard, optimizer.only_new(run),
  )  # fmt: skip
  goodput = timing.Goodput(began)

  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    folder = job.folder / 'checkpoints'
    for sentence in processes.decide(lambda: integrity.set_aside(folder)):
      log.note(sentence)
    checkpoints = checkpoint.Checkpoints(folder, run.intervals.keep, run.intervals.keep_every)
    stack.push(lambda kind, error, trace: _close(checkpoints, error))
    batches = mixture.iterate(batches_of(run, recipe, job.dataset), prefetch=4)
    first_step, state, saved = _start(job, mesh, checkpoints, batches)
    writer = stack.enter_context(log.Writer(job.folder, first_step))
    goodput.resume(saved.get('spent', {}), writer.dropped)

    def alive(*step_and_facts: Any) -> None:
      if run.watch.stall_seconds:  # within a second, threads that are at work would be shown
        seconds = min(max(run.watch.stall_seconds, 1.0), threading.TIMEOUT_MAX)
        faulthandler.dump_traceback_later(seconds, file=sys.__stderr__)

    skips = guard.Skips(name, run.guard, checkpoints.newest_folder, saved.get('skipped', (0, 0)))
    steps = stack.enter_context(log.Log(job, first_step, writer, goodput))
    hooks = hooks_lib.Hooks(alive, skips, steps)
    profile = hooks_lib.Profile(job.folder / 'profile', run.watch, hooks.settle)
    stack.callback(profile.close)
    stack.callback(faulthandler.cancel_dump_traceback_later)
    alive()

    def evaluate(step: int, state: step_lib.State, between: Callable = alive) -> None:
      hooks.settle()
      with goodput.spend('evaluate'):
        found = heldout.evaluate(job, state.params, recipe.evaluation.tokens, between)
      steps.valid(step, found)

    def save(step: int, state: step_lib.State) -> None:
      hooks.settle()  # raises if this step did harm
      if step == checkpoints.latest():
        return
      with goodput.spend('checkpoint'):
        data = dict(iterator=batches.get_state(), skipped=skips.counts, spent=goodput.spent())
        writer.flush()  # a resume at this step reads what was written of the steps before it
        checkpoints.save(step, state.params, state.opt_state, data, job.meta(step))

    def stop_if_asked(step: int, state: step_lib.State) -> None:
      if signum := stopping.agreed():
        save(step, state)
        raise stop.Stopped(signum)

    def stop_at_once() -> None:  # once the last step is saved
      alive()
      stop_if_asked(total_steps, state)

    between_steps = (  # each after so many steps; 0: never
      (evaluate, run.intervals.evaluate), (save, run.intervals.checkpoint), (stop_if_asked, 1),
    )  # fmt: skip
    stack.enter_context(goodput.spend('step'))
    for step in range(first_step + 1, total_steps + 1):
      profile.before(step)
      with goodput.spend('data'):
        batch = sharding.put_batch(next(batches), mesh)
      rates = optimizer.learning_rates(recipe, name, step)
      rates = jax.make_array_from_process_local_data(replicated, rates)
      compiles = step == first_step + 1  # and compiling may transfer constants
      with (
        goodput.spend('compile' if compiles else 'step'),
        jax.transfer_guard('allow' if compiles else 'disallow'),
      ):
        state, step_metrics = train_step(state, batch, rates)
      hooks.dispatched(step, step_metrics)
      for do, every in between_steps:
        if every and step % every == 0 and step < total_steps:
          do(step, state)

    hooks.settle()
    profile.close()
    save(total_steps, state)
    # The curve's last point is over the text of all its points; the result is over everything.
    evaluate(total_steps, state, stop_at_once)
    with goodput.spend('evaluate'):
      domains = heldout.evaluate(job, state.params, None, stop_at_once)
    with goodput.spend('checkpoint'):
      checkpoints.wait()
    return {
      'step': total_steps,
      'tokens': total_steps * recipe.step_tokens(name),
      'wall_seconds': goodput.facts()['seconds'],
      'time': goodput.spent(),
      'skipped': skips.counts[0],
      'domains': domains,
    }


def _close(checkpoints: checkpoint.Checkpoints, error: BaseException | None) -> None:
  # What is being written cannot be finished without a process that was lost.
  if jax.process_count() > 1 and errors.of_jax(error):
    return
  try:
    checkpoints.close()
  except UserError:
    if not isinstance(error, UserError):  # one sentence is enough of a full disk
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
    first_step, saved = 0, {}
  else:
    params, opt_state, saved = checkpoints.restore(first_step, abstract.params, abstract.opt_state)
    batches.set_state(saved['iterator'])
  return first_step, step_lib.State(params, opt_state), saved


def batches_of(
  run: config.Run, recipe: config.Recipe, dataset: store.Dataset
) -> grain.MapDataset[mixture.Batch]:
  """The training batches of a run, by step; this process's rows of each."""
  return mixture.batches(
    {domain: dataset.documents(domain, 'train') for domain in run.data},
    run.data,
    sequence_length=recipe.data.sequence_length,
    batch_size=run.batch_size,
    # One number from both: runs of one recipe with one data seed read alike.
    seed=recipe.seed * 1_000_003 + run.data_seed,
    share=processes.share_of_batch(sharding.make_mesh(run.mesh)),
  )
