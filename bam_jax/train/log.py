"""What a run writes and shows: `metrics.jsonl`, TensorBoard events, and its progress."""

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import tensorboardX
from etils import epath
from tensorboardX.proto import event_pb2, summary_pb2

from bam_jax import config
from bam_jax.files import buckets, folders, json_file
from bam_jax.model import arithmetic, block, router
from bam_jax.train import optimizer, timing
from bam_jax.train import step as step_lib
from bam_jax.train.progress import Progress

FLUSH_SECONDS = 60.0  # until a bucket, or TensorBoard, sees what was written

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets.
PEAK_FLOPS = {
  'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5': 459e12, 'TPU v5p': 459e12,
  'TPU v6 lite': 918e12, 'NVIDIA A100-SXM4-40GB': 312e12, 'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA H200': 989e12,
}  # fmt: skip


def of_step(metrics: step_lib.StepMetrics) -> dict[str, Any]:
  """A step's metrics as plain numbers; waits for the step."""
  metrics = jax.device_get(metrics)
  facts = {
    'loss': float(metrics.loss),
    'nll': float(metrics.sums.nll / max(float(metrics.sums.targets), 1.0)),
    'gradient_norm': float(metrics.gradient_norm),
  }
  if metrics.spike is not None:
    facts['spike'] = bool(metrics.spike)
  return facts | of_routers(metrics.sums.routing)


def of_routers(routing: block.Routing) -> dict[str, Any]:
  """What `of_router` returns, for those routers that the model has."""
  return {k: of_router(stats) for k, stats in routing._asdict().items() if stats is not None}


def of_router(stats: router.Statistics) -> dict[str, Any]:
  """For every layer each expert's share of the assignments, and means over the tokens.

  `entropy` is in nats, `dropped` the number of a token's assignments that were dropped.
  """
  load, tokens = np.asarray(stats.load, np.float64), np.maximum(stats.tokens, 1.0)
  return {
    'load': (load / np.maximum(load.sum(-1, keepdims=True), 1)).tolist(),
    'entropy': (np.asarray(stats.entropy) / tokens).tolist(),
    'dropped': (np.asarray(stats.dropped) / tokens).tolist(),
  }


def mfu(flops_per_token: float, tokens_per_second: float, num_devices: int) -> float | None:
  """Model FLOPs utilisation, or None on a device whose peak is not known."""
  peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
  return flops_per_token * tokens_per_second / (peak * num_devices) if peak else None


class Writer:
  """Appends to a run's metrics; a context manager. Only the job's first process writes.

  `dropped` holds what an earlier attempt wrote of steps that are to be done again.
  """

  def __init__(self, folder: Path | epath.Path, start_step: int):
    """Opens the files, dropping what an earlier attempt wrote of steps after `start_step`."""
    self.dropped: list[dict[str, Any]] = []
    self._closing, self._file = contextlib.ExitStack(), None
    if jax.process_index():
      return
    self._path, self._flushed = folder / 'metrics.jsonl', time.monotonic()
    lines = read_lines(self._path)
    self.dropped = [facts for _, facts in lines if facts['step'] > start_step]
    kept = ''.join(text for text, facts in lines if facts['step'] <= start_step)
    name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}'
    with folders.writing(folder):
      (folder / 'tensorboard').mkdir(parents=True, exist_ok=True)
    self._mirrors = [buckets.Mirror(p) for p in (self._path, folder / 'tensorboard' / name)]
    for mirror in self._mirrors:
      self._closing.callback(mirror.close)
    folders.write_file(self._mirrors[0].path, kept)
    with folders.writing(folder):
      self._file = self._closing.enter_context(open(self._mirrors[0].path, 'ab', buffering=0))
      # The library's SummaryWriter writes in a thread, in which a full disk is only a traceback.
      self._events = tensorboardX.RecordWriter(str(self._mirrors[1].path))
      self._closing.callback(self._close_events)
      self._write_event(file_version='brain.Event:2')
      # TensorBoard no longer shows what earlier files have from here on.
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._write_event(step=start_step + 1, session_log=start)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error) -> None:
    self._closing.close()

  def write(self, step: int, facts: dict[str, Any]) -> None:
    """Writes the facts of a step, nested values as one TensorBoard curve each; else UserError."""
    if not self._file:
      return
    line = (json.dumps({'step': step, **facts}) + '\n').encode()
    values = [summary_pb2.Summary.Value(tag=tag, simple_value=x) for tag, x in _flatten(facts)]
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
      for mirror in self._mirrors:
        mirror.send()
      self._flushed = time.monotonic()

  def _write_event(self, **fields) -> None:
    self._events.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())

  def _close_events(self) -> None:
    with contextlib.suppress(OSError):
      self._events.close()


def read_lines(path: Path | epath.Path) -> list[tuple[str, dict[str, Any]]]:
  """A file's lines through which curves can be drawn, and what they say.

  A kill or a full disk may have cut one short.
  """
  lines = []
  text = path.read_bytes().decode(errors='replace') if path.exists() else ''
  for line in text.splitlines(keepends=True):
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OverflowError):
      facts = json_file.loads(line)
      # Raises for what is not a number, or not one that a float can hold.
      float(sum([facts['step'], facts.get('nll', 0.0), *facts.get('valid', {}).values()]))
      if line.endswith('\n') and type(facts['step']) is int:
        lines.append((line, facts))
  return lines


def _flatten(value: Any, tag: str = '') -> list[tuple[str, float]]:
  if isinstance(value, dict | list):
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    prefix = f'{tag}/' if tag else ''
    return [item for key, inner in pairs for item in _flatten(inner, f'{prefix}{key}')]
  return [] if value is None else [(tag, value)]


class Log:
  """Writes and shows a run's steps: a hook of finished steps, after `guard.Skips`.

  `loss` is that of the last step that was taken; `first_step` were done before this attempt.
  """

  def __init__(
    self,
    recipe: config.Recipe,
    name: str,
    model: config.Model,
    first_step: int,
    writer: Writer,
    progress: Progress,
    goodput: timing.Goodput,
  ):
    self._recipe, self._name, self._first_step = recipe, name, first_step
    self._writer, self._progress, self._goodput = writer, progress, goodput
    self._flops_per_token = arithmetic.training_flops(model, recipe.data.sequence_length)
    self._mark: tuple[int, float] | None = None  # step and time that the speed is measured from
    self._speed = 0.0
    self.loss: float | None = None
    progress.start(name, first_step)

  def __call__(self, step: int, facts: dict[str, Any]) -> None:
    """Writes every `intervals.log`-th and the last step, and those that were skipped."""
    name, run = self._name, self._recipe.runs[self._name]
    if step == self._first_step + 1:
      seconds, compiling = self._goodput.attempt
      times = {'first_step_seconds': seconds, 'first_step_compile_seconds': compiling}
      self._writer.write(step, times)
      self._progress.note(
        f'{name}: first step done after {seconds:.1f} s, {compiling:.1f} s of them compiling'
      )
    if not facts.pop('taken'):
      self._progress.note(f'{name}: skipped step {step:,}, loss {facts["loss"]:.4g}')
      self._writer.write(step, {'skipped': facts['skipped']})
      self._mark = step, time.monotonic()
      return
    self.loss = facts['loss']
    speed, shares = self._tokens_per_second(step), self._goodput.shares()
    self._progress.update(name, step, self.loss, speed, shares['step'])
    if step % run.intervals.log == 0 or step == self._recipe.total_steps(name):
      facts |= {
        'learning_rate': float(optimizer.learning_rates(self._recipe, name, step)[0]),
        'tokens': step * self._recipe.step_tokens(name),
        'tokens_per_second': speed,
        'mfu': mfu(self._flops_per_token, speed, run.mesh.size),
        'seconds': self._goodput.seconds,
        'goodput': shares['step'],
        'time': shares,
      }
      self._writer.write(step, facts)

  def valid(self, step: int, domains: dict[str, dict[str, Any]]) -> None:
    """Held-out losses after a step; what they took does not count as training speed."""
    nats_per_token = {name: facts['nll'] / facts['tokens'] for name, facts in domains.items()}
    self._writer.write(step, {'valid': nats_per_token})
    self._mark = step, time.monotonic()

  def _tokens_per_second(self, step: int) -> float:
    """Speed with a memory of about ten steps; 0 at the first one, which compiles."""
    now = time.monotonic()
    if self._mark and step > self._mark[0]:
      tokens = (step - self._mark[0]) * self._recipe.step_tokens(self._name)
      latest = tokens / (now - self._mark[1])
      self._speed = latest if not self._speed else 0.9 * self._speed + 0.1 * latest
    self._mark = step, now
    return self._speed
