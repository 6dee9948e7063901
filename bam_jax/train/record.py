"""Follows a run's steps: has each judged, times it, and tells files and people about it."""

import time
from collections.abc import Callable
from typing import Any

from bam_jax.train import goodput, guard, metrics
from bam_jax.train import step as step_lib
from bam_jax.train.progress import Progress


class Recorder:
  """Metrics of a run, read one step late so that the device never waits for the host.

  Args:
    name: of the run.
    writer: metrics.jsonl and TensorBoard.
    progress: what a person sees.
    first_step: steps done before this attempt.
    total_steps: of the run.
    spent: where its time goes.
    skips: judges its steps.
    done: is told the number of every step that has finished.
    step_tokens: tokens of a step.
    flops_per_token: training FLOPs of one token.
    num_devices: that share the work.
    log_every: steps between two lines of metrics.jsonl.
    learning_rate: of step 0, 1, ...
  """

  def __init__(
    self,
    name: str,
    writer: metrics.Writer,
    progress: Progress,
    *,
    first_step: int,
    total_steps: int,
    spent: goodput.Goodput,
    skips: guard.Skips,
    done: Callable[[int], None],
    step_tokens: int,
    flops_per_token: float,
    num_devices: int,
    log_every: int,
    learning_rate: Callable[[int], float],
  ):
    self._name, self._writer, self._progress = name, writer, progress
    self._first_step, self._total_steps, self._step_tokens = first_step, total_steps, step_tokens
    self._flops_per_token, self._num_devices = flops_per_token, num_devices
    self._log_every, self._learning_rate = log_every, learning_rate
    self._spent, self._skips, self._done = spent, skips, done
    self._pending: tuple[int, step_lib.StepMetrics] | None = None
    self._mark: tuple[int, float] | None = None  # step and time that the speed is measured from
    self._speed = 0.0
    self.loss: float | None = None
    progress.start(name, first_step)

  def step(self, step: int, step_metrics: step_lib.StepMetrics) -> None:
    """A step was dispatched: reads the one before while it runs."""
    self.settle()
    self._pending = step, step_metrics

  def settle(self) -> None:
    """Waits for the step that is under way; after it, the state is known to be sound.

    Raises:
      guard.Diverged: it is not.
    """
    if self._pending is None:
      return
    (step, step_metrics), self._pending = self._pending, None
    facts = metrics.of_step(step_metrics)
    self._done(step)
    if step == self._first_step + 1:
      self._tell_first(step)
    if self._skips.skipped(step, facts):
      self._progress.note(f'{self._name}: skipped step {step:,}, loss {facts["loss"]:.4g}')
      self._writer.write(step, {'skipped': self._skips.total})
      self._mark = step, time.monotonic()
      return
    self.loss = facts['loss']
    speed, shares = self._tokens_per_second(step), self._spent.shares()
    self._progress.update(self._name, step, self.loss, speed, shares['step'])
    if step % self._log_every == 0 or step == self._total_steps:
      facts |= {
        'learning_rate': self._learning_rate(step - 1),
        'tokens': step * self._step_tokens,
        'tokens_per_second': speed,
        'mfu': metrics.mfu(self._flops_per_token, speed, self._num_devices),
        'skipped': self._skips.total,
        'seconds': self._spent.seconds,
        'goodput': shares['step'],
        'time': shares,
      }
      self._writer.write(step, facts)

  def _tell_first(self, step: int) -> None:
    seconds, compiling = self._spent.attempt
    self._progress.note(
      f'{self._name}: first step done after {seconds:.1f} s, {compiling:.1f} s of them compiling'
    )
    facts = {'first_step_seconds': seconds, 'first_step_compile_seconds': compiling}
    self._writer.write(step, facts)

  def valid(self, step: int, nats_per_token: dict[str, Any]) -> None:
    """Held-out losses after a step; what they took does not count as training speed."""
    self._writer.write(step, {'valid': nats_per_token})
    self._mark = step, time.monotonic()

  def _tokens_per_second(self, step: int) -> float:
    """Speed with a memory of about ten steps; 0 at the first one, which compiles."""
    now = time.monotonic()
    if self._mark is not None and step > self._mark[0]:
      latest = (step - self._mark[0]) * self._step_tokens / (now - self._mark[1])
      self._speed = latest if not self._speed else 0.9 * self._speed + 0.1 * latest
    self._mark = step, now
    return self._speed
