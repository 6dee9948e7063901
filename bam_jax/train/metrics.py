"""What a run writes about itself: `metrics.jsonl`, a line a logged step, and TensorBoard events."""

import contextlib
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from bam_jax.files import buckets, folders, json_file
from bam_jax.model import block, router
from bam_jax.train import events
from bam_jax.train import step as step_lib

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets.
PEAK_FLOPS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
}


def of_step(metrics: step_lib.StepMetrics) -> dict[str, Any]:
  """A step's metrics as plain numbers; waits for the step."""
  metrics = jax.device_get(metrics)
  sums = metrics.sums
  facts = {
    'loss': float(metrics.loss),
    'nll': float(sums.nll / max(float(sums.targets), 1.0)),
    'gradient_norm': float(metrics.gradient_norm),
  }
  if metrics.spike is not None:
    facts['spike'] = bool(metrics.spike)
  for name, stats in named_routers(sums.routing):
    facts[name] = of_router(stats)
  return facts


def named_routers(routing: block.Routing) -> list[tuple[str, router.Statistics]]:
  """The routers that a model has."""
  return [(name, stats) for name, stats in routing._asdict().items() if stats is not None]


def of_router(stats: router.Statistics) -> dict[str, Any]:
  """Means over the tokens, for every layer; `entropy` in nats, `dropped` a share of the tokens.

  `load` is the share of the assignments that each expert got.
  """
  assigned = np.maximum(np.asarray(stats.load, np.float64).sum(-1, keepdims=True), 1)
  tokens = np.maximum(np.asarray(stats.tokens, np.float64), 1)
  return {
    'load': (np.asarray(stats.load) / assigned).tolist(),
    'entropy': (np.asarray(stats.entropy) / tokens).tolist(),
    'dropped': (np.asarray(stats.dropped) / tokens).tolist(),
  }


def mfu(flops_per_token: float, tokens_per_second: float, num_devices: int) -> float | None:
  """Model FLOPs utilisation, or None on a device whose peak is not known."""
  peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
  return flops_per_token * tokens_per_second / (peak * num_devices) if peak else None


FLUSH_SECONDS = 60.0  # until a bucket, or TensorBoard, sees what was written


class Writer:
  """Appends to a run's metrics; a process that is not the first writes nothing."""

  def __init__(self, folder: Path | epath.Path, start_step: int):
    """Opens the files, dropping what an earlier attempt wrote of steps after `start_step`.

    Attributes:
      dropped: that, the facts of each line.
    """
    self._file = self._events = None
    self.dropped: list[dict[str, Any]] = []
    if jax.process_index():
      return
    self._path = path = folder / 'metrics.jsonl'
    lines = read_lines(path)
    self.dropped = [facts for _, facts in lines if facts['step'] > start_step]
    kept = ''.join(text for text, facts in lines if facts['step'] <= start_step)
    self._mirror, self._flushed = buckets.Mirror(path), time.monotonic()
    folders.write_file(self._mirror.path, kept)
    with folders.writing(folder):
      self._file = open(self._mirror.path, 'ab', buffering=0)
      self._events = events.Events(folder / 'tensorboard', start_step + 1)

  def write(self, step: int, facts: dict[str, Any]) -> None:
    """Writes the facts of a step; nested values become one TensorBoard curve each."""
    if not self._file:
      return
    line = (json.dumps({'step': step, **facts}) + '\n').encode()
    with folders.writing(self._path):
      self._events.write(step, _flatten(facts))
      if self._file.write(line) < len(line):  # what came before the end is dropped at the resume
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if time.monotonic() - self._flushed > FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Lets a bucket, and TensorBoard, see all that was written."""
    if self._file:
      with folders.writing(self._path):
        self._events.flush()
      self._mirror.send()
      self._flushed = time.monotonic()

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._file:
      self._file.close()
      self._mirror.close()
      self._events.close()


def read_lines(path: Path | epath.Path) -> list[tuple[str, dict[str, Any]]]:
  """A file's sound lines and what they say; a kill or a full disk may have cut one short."""
  if not path.exists():
    return []
  lines = []
  for line in path.read_bytes().decode(errors='replace').splitlines(keepends=True):
    with contextlib.suppress(ValueError):
      facts = json_file.loads(line)
      if line.endswith('\n') and isinstance(facts, dict) and _is_sound(facts):
        lines.append((line, facts))
  return lines


def _is_sound(facts: dict[str, Any]) -> bool:
  """Whether a curve can be drawn through a line."""
  step, valid = facts.get('step'), facts.get('valid', {})
  if type(step) is not int or not isinstance(valid, dict):
    return False
  numbers = [step, facts.get('nll', 0.0), *valid.values()]
  if not all(isinstance(number, int | float) for number in numbers):
    return False
  try:
    np.array(numbers, np.float64)
  except OverflowError:  # JSON's integers have no end
    return False
  return True


def _flatten(value: Any, tag: str = '') -> list[tuple[str, float]]:
  if isinstance(value, dict):
    pairs = value.items()
  elif isinstance(value, list):
    pairs = enumerate(value)
  else:
    return [] if value is None else [(tag, value)]
  return [
    item for key, inner in pairs for item in _flatten(inner, f'{tag}/{key}' if tag else str(key))
  ]
