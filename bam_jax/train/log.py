"""What a run writes and shows: `metrics.jsonl`, TensorBoard events, and its progress."""

import contextlib
import errno
import functools
import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import tensorboardX
from etils import epath
from tensorboardX.proto import event_pb2, summary_pb2

from bam_jax.files import folders, json_file
from bam_jax.model import arithmetic, block
from bam_jax.train import optimizer, timing
from bam_jax.train import step as step_lib
from bam_jax.train.job import Job

FLUSH_SECONDS = 60.0  # until a bucket, or TensorBoard, sees what was written
PRINT_SECONDS = 10.0  # between two lines about a run

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets.
PEAK_FLOPS = {
  'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5': 459e12, 'TPU v5p': 459e12,
  'TPU v6 lite': 918e12, 'NVIDIA A100-SXM4-40GB': 312e12, 'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA H200': 989e12,
}  # fmt: skip


def of_step(metrics: step_lib.StepMetrics) -> dict[str, Any]:
  """A step's metrics as plain numbers; waits for the step."""
  metrics = jax.device_get(metrics)
  return {
    'loss': float(metrics.loss),
    'nll': float(metrics.sums.nll) / max(int(metrics.sums.targets), 1),
    'gradient_norm': float(metrics.gradient_norm),
    **of_routers(metrics.sums.routing),
  }


def of_routers(routing: block.Routing) -> dict[str, Any]:
  """By router and layer the experts' shares of the assignments; means over tokens, nats."""
  facts = {}
  for name, stats in routing._asdict().items():
    if stats is not None:
      load, tokens = np.asarray(stats.load, np.float64), np.maximum(stats.tokens, 1.0)
      facts[name] = {
        'load': (load / np.maximum(load.sum(-1, keepdims=True), 1)).tolist(),
        'entropy': (np.asarray(stats.entropy) / tokens).tolist(),
        'dropped': (np.asarray(stats.dropped) / tokens).tolist(),
      }
  return facts


class Writer(contextlib.ExitStack):
  """Appends to a run's metrics; a context manager. Only the job's first process writes."""

  def __init__(self, folder: Path | epath.Path, start_step: int):
    """Opens the files; `dropped` is what an earlier attempt wrote of steps after `start_step`."""
    super().__init__()
    self.dropped, self._file = [], None
    if jax.process_index():
      return
    self._path, self._flushed = folder / 'metrics.jsonl', time.monotonic()
    lines = read_lines(self._path)
    self.dropped = [facts for _, facts in lines if facts['step'] > start_step]
    kept = ''.join(text for text, facts in lines if facts['step'] <= start_step)
    name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}'
    names, local, self._send = ['metrics.jsonl', f'tensorboard/{name}'], folder, lambda: None
    if folders.in_bucket(folder):  # whose objects cannot grow
      beside = tempfile.TemporaryDirectory(prefix='bam_jax-', ignore_cleanup_errors=True)
      local = Path(self.enter_context(beside))
      self._send = functools.partial(folders.send, local, folder, names)
      self.callback(self._send)
    with folders.writing(folder):
      (local / 'tensorboard').mkdir(parents=True, exist_ok=True)
      folders.write_file(local / names[0], kept)
      self._file = self.enter_context(open(local / names[0], 'ab', buffering=0))
      # The library's SummaryWriter writes in a thread, in which a full disk is only a traceback.
      self._events = tensorboardX.RecordWriter(str(local / names[1]))
      self.callback(self._close_events)
      self._write_event(file_version='brain.Event:2')
      # TensorBoard no longer shows what earlier files have from here on.
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._write_event(step=start_step + 1, session_log=start)

  def write(self, step: int, facts: dict[str, Any]) -> None:
    """Writes the facts of a step, nested values as one TensorBoard curve each; else UserError."""
    if not self._file:
      return
    line = (json.dumps({'step': step, **facts}) + '\n').encode()
    tag = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
    leaves = jax.tree_util.tree_leaves_with_path(facts)
    values = [summary_pb2.Summary.Value(tag=tag(path), simple_value=x) for path, x in leaves]
    with folders.writing(self._path):
      self._write_event(step=step, summary=summary_pb2.Summary(value=values))
      if self._file.write(line) < len(line):  # half a line is dropped when the run resumes
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if time.monotonic() - self._flushed > FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Lets a bucket, and TensorBoard, see all that was written."""
    if self._file:
      with folders.writing(self._path):
        self._events.flush()
      self._send()
      self._flushed = time.monotonic()

  def _close_events(self) -> None:
    with contextlib.suppress(OSError):  # reported by `write` already
      self._events.close()

  def _write_event(self, **fields) -> None:
    self._events.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())


def read_lines(path: Path | epath.Path) -> list[tuple[str, dict[str, Any]]]:
  """A file's sound lines and what they say; a kill or a full disk may have cut one short."""
  lines = []
  text = path.read_bytes().decode(errors='replace') if path.exists() else ''
  for line in text.splitlines(keepends=True):
    with contextlib.suppress(ValueError):
      if line.endswith('\n'):
        lines.append((line, json_file.loads(line)))
  return lines


class Log:
  """Writes and prints a run's steps: a context manager, and a hook that follows `guard.Skips`."""

  def __init__(self, job: Job, first_step: int, writer: Writer, goodput: timing.Goodput):
    self._job, self._writer, self._goodput = job, writer, goodput
    self._first_step = self._step = first_step
    self._total_steps = job.recipe.total_steps(job.name)
    self._step_tokens = job.recipe.step_tokens(job.name)
    flops = arithmetic.training_flops(job.model, job.recipe.data.sequence_length)
    self._step_flops = flops * self._step_tokens
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    self._peak_flops = peak and peak * job.run.mesh.size  # None: not known
    self._speed, self._mark = 0.0, (first_step, 0.0)  # steps a second; step and time it counts from
    self._loss, self._printed = None, time.monotonic()

  def __enter__(self) -> Self:
    how = f'resumes at step {self._step:,} of' if self._step else 'starts,'
    note(f'{self._job.name}: {how} {self._total_steps:,} steps')
    return self

  def __exit__(self, kind: type | None, *error) -> None:
    how = f'stopped at step {self._step:,} of {self._total_steps:,}' if kind else 'done'
    loss = '' if self._loss is None else f', loss {self._loss:.4f}'
    note(f'{self._job.name}: {how}{loss}, {duration(self._goodput.attempt()[0])}')

  def __call__(self, step: int, facts: dict[str, Any]) -> None:
    """Writes every `intervals.log`-th and the last step, and those that were skipped."""
    name, run, now = self._job.name, self._job.run, time.monotonic()
    if step == self._first_step + 1:
      seconds, compiling = self._goodput.attempt()
      times = {'first_step_seconds': seconds, 'first_step_compile_seconds': compiling}
      self._writer.write(step, times)
      note(f'{name}: first step done after {seconds:.1f} s, {compiling:.1f} s of them compiling')
    self._step = step
    if not facts.pop('taken'):
      note(f'{name}: skipped step {step:,}, loss {facts["loss"]:.4g}')
      self._writer.write(step, {'skipped': facts['skipped']})
      self._mark = step, now
      return
    self._loss, times = facts['loss'], self._goodput.facts()
    if self._mark[1] and step > self._mark[0]:
      latest = (step - self._mark[0]) / (now - self._mark[1])
      self._speed = 0.9 * self._speed + 0.1 * latest if self._speed else latest
    self._mark = step, now
    speed = self._speed * self._step_tokens
    if now - self._printed > PRINT_SECONDS:
      self._printed = now
      left = (self._total_steps - step) / self._speed if self._speed else 0
      note(
        f'{name}: step {step:,} of {self._total_steps:,}, loss {self._loss:.4f}, {speed:,.0f} '
        f'tokens/s, goodput {times["goodput"]:.0%}' + (f', {duration(left)} left' if left else '')
      )
    if step % run.intervals.log == 0 or step == self._total_steps:
      facts |= times | {
        'learning_rate': float(optimizer.learning_rates(self._job.recipe, name, step)[0]),
        'tokens': step * self._step_tokens,
        'tokens_per_second': speed,
        'mfu': self._peak_flops and self._speed * self._step_flops / self._peak_flops,
      }
      self._writer.write(step, facts)

  def valid(self, step: int, domains: dict[str, dict[str, Any]]) -> None:
    """Held-out losses after a step; what they took does not count as training speed."""
    nats_per_token = {name: facts['nll'] / facts['tokens'] for name, facts in domains.items()}
    self._writer.write(step, {'valid': nats_per_token})
    self._mark = step, time.monotonic()


def note(text: str) -> None:
  """Prints a line to standard error in the job's first process; results go to standard output."""
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
  """A span of time for a person: 42s, 3m 05s, 1h 02m."""
  minutes, seconds = divmod(round(seconds), 60)
  if minutes >= 60:
    return f'{minutes // 60}h {minutes % 60:02}m'
  return f'{minutes}m {seconds:02}s' if minutes else f'{seconds}s'
