"""Real processes with fake CPU devices, which meet over gloo as hosts do over their network."""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bam_jax import checkpoint

ROOT = Path(__file__).parents[2]
CACHE = tempfile.TemporaryDirectory(prefix='bam_jax_test_')  # which goes with this process
MESH = '1x1x2x1'  # of two processes: every expert on a host of its own
MAIN = ('-m', 'bam_jax.main')
SECONDS = 240  # that a job of these sizes may take on a busy machine


class Job:
  """Processes that were started together."""

  def __init__(self, commands: list[list[str]], devices: int, variables: Sequence[dict] = ()):
    """Starts one Python for each list of arguments, with so many devices each."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(('XLA_', 'JAX_'))}
    environment = kept | {
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(devices),
      'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
      'JAX_COMPILATION_CACHE_DIR': CACHE.name,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    }
    self.processes = [
      subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment | more, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      )
      for command, more in itertools.zip_longest(commands, variables, fillvalue={})
    ]  # fmt: skip

  def ends(self) -> list[tuple[int, str]]:
    """Waits; exit status and standard error of every process."""
    told = [process.communicate(timeout=SECONDS)[1] for process in self.processes]
    return [(process.returncode, text) for process, text in zip(self.processes, told)]

  def succeeds(self) -> list[str]:
    """Waits; standard error of every process, none of which failed."""
    ends = self.ends()
    assert [status for status, _ in ends] == [0] * len(ends), ends
    return [text for _, text in ends]

  def wait_for_step(self, folder: Path, step: int) -> None:
    """Until a run has logged a step."""
    self._wait(lambda: step in losses(folder))

  def wait_for_checkpoint(self, folder: Path) -> None:
    """Until a run has a checkpoint."""
    self._wait(lambda: checkpoint.finished_step(folder / 'checkpoints') is not None)

  def _wait(self, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
      for process in self.processes:
        assert process.poll() is None, process.communicate()
      assert time.monotonic() < deadline
      time.sleep(0.002)


@contextlib.contextmanager
def job(
  workdir: Path, text: Path, processes: int, mesh: str, *flags: str, steps: int = 12, main=MAIN
) -> Iterator[Job]:
  """A job of `main` on the recipe tests/assets/job.py; nothing of it is left afterwards.

  Args:
    processes: how many share the mesh's devices; one is started without flags.
    mesh: sizes of its axes, such as 2x1x1x1.
    *flags: more of them; "{process}" becomes the process's number.
  """
  recipe = f'--config={ROOT}/tests/assets/job.py:{text},{steps},{mesh}'
  port = free_port()
  commands = []
  for process in range(processes):
    place = [f'--coordinator=127.0.0.1:{port}', f'--process_count={processes}']
    place = [*place, f'--process_id={process}'] if processes > 1 else []
    line = [*main, recipe, f'--workdir={workdir}', *place, *flags]
    commands.append([part.format(process=process) for part in line])
  devices = int(np.prod([int(size) for size in mesh.split('x')])) // processes
  started = Job(commands, devices)
  try:
    yield started
  finally:
    for process in started.processes:
      process.kill()
      process.communicate()


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def params_of(folder: Path) -> dict[str, np.ndarray]:
  """The newest parameters of a run, by path."""
  reader = checkpoint.open_params(folder, checkpoint.read_meta(folder).model)
  return {path: reader.read(path) for path in reader.specs}


def assert_same_bits(folder: Path, reference: Path) -> None:
  """Two runs ended in the same parameters, losses and held-out results, to the last bit."""
  mine, other = params_of(folder), params_of(reference)
  assert {k: v.tobytes() for k, v in mine.items()} == {k: v.tobytes() for k, v in other.items()}
  assert losses(folder) == losses(reference)
  assert result(folder) == result(reference)


def losses(folder: Path) -> dict[int, float]:
  metrics = folder / 'metrics.jsonl'
  text = metrics.read_text() if metrics.exists() else ''
  lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith('\n')]
  steps = [line['step'] for line in lines if 'loss' in line]
  assert len(steps) == len(set(steps)), 'a step is told twice'
  return {line['step']: line['loss'] for line in lines if 'loss' in line}


def result(folder: Path) -> dict:
  return json.loads((folder / 'result.json').read_text())['domains']
