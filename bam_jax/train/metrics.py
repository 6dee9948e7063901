"""What a run writes about itself: `metrics.jsonl`, a line a logged step, and TensorBoard events."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from bam_jax.model import block, router
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
  for name, stats in named_routers(sums.routing):
    facts[name] = of_router(stats)
  return facts


def named_routers(routing: block.Routing) -> list[tuple[str, router.Statistics]]:
  """The routers that a model has."""
  return [(name, stats) for name, stats in routing._asdict().items() if stats is not None]


def of_router(stats: router.Statistics) -> dict[str, Any]:
  """Means over the tokens, for every layer; `entropy` in nats, `dropped` a share of the tokens."""
  tokens = np.maximum(np.asarray(stats.tokens, np.float64), 1)
  return {
    'load': (np.asarray(stats.load) / tokens[:, None]).tolist(),
    'entropy': (np.asarray(stats.entropy) / tokens).tolist(),
    'dropped': (np.asarray(stats.dropped) / tokens).tolist(),
  }


def mfu(flops_per_token: float, tokens_per_second: float, num_devices: int) -> float | None:
  """Model FLOPs utilisation, or None on a device whose peak is not known."""
  peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
  return flops_per_token * tokens_per_second / (peak * num_devices) if peak else None


def finite(facts: dict[str, Any]) -> bool:
  """Whether loss and gradient are numbers."""
  return math.isfinite(facts['loss']) and math.isfinite(facts['gradient_norm'])


class Writer:
  """Appends to a run's metrics; a process that is not the first writes nothing."""

  def __init__(self, folder: Path, start_step: int):
    """Opens the files, dropping what an earlier attempt wrote of steps after `start_step`."""
    self._file = self._events = None
    if jax.process_index():
      return
    path = folder / 'metrics.jsonl'
    kept = [line for line in _lines(path) if json.loads(line)['step'] <= start_step]
    path.write_text(''.join(kept), encoding='utf-8')
    self._file = path.open('a', encoding='utf-8')
    self._events = SummaryWriter(str(folder / 'tensorboard'), purge_step=start_step + 1)

  def write(self, step: int, facts: dict[str, Any]) -> None:
    """Writes the facts of a step; nested values become one TensorBoard curve each."""
    if not self._file:
      return
    self._file.write(json.dumps({'step': step, **facts}) + '\n')
    self._file.flush()
    for tag, value in _flatten(facts):
      self._events.add_scalar(tag, value, step)

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._file:
      self._file.close()
      self._events.close()


def _lines(path: Path) -> list[str]:
  """Complete lines of a file; a kill may have cut the last one short."""
  if not path.exists():
    return []
  lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
  return [line for line in lines if line.endswith('\n')]


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
