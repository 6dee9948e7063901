"""Trains for half an hour under random kills and preemptions; compares with an undisturbed run.

    python -m benchmarks.soak --workdir=/tmp/soak
    python -m benchmarks.soak --workdir=/tmp/soak --minutes=60 --every=20 --seed=1 --json=-

Two processes of one device each train the quick start's seed, specialists and BAM with KV experts,
the dense models' parameters sharded over both, the mixture's experts divided between them. The
first run is undisturbed. Then, in a fresh workdir, at random moments: `kill -9` of one process or
of both, SIGTERM to one, Ctrl-C to both, one that hangs. In each case both must exit in a bounded
time, and the same command resumes. When the recipe is done and time is left, a new round starts.

`--json` writes, for all rounds: `rounds`, `minutes`, `events` (how many of each kind), `statuses`
(how often processes ended with each), `attempts`, `lost_steps` (logged, and repeated),
`steps` whose losses were compared, their `largest_difference` from the undisturbed ones,
`equal_parameters` (all final arrays, bitwise) and `equal_results` (held-out sums).
"""

import collections
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from bam_jax import checkpoint, cli
from bam_jax.errors import UserError

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for the runs.')
_MINUTES = flags.DEFINE_float('minutes', 30, 'Minimum time under disturbances.', lower_bound=0.1)
_EVERY = flags.DEFINE_float('every', 30, 'Mean seconds between disturbances.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 0, "Steps of each run; default: the recipe's.")
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the disturbances.')

RUNS = ('seed', 'code', 'law', 'math', 'bam_kv')
CHECKPOINT = 20  # steps from one to the next
LOST_SECONDS = 10  # after which a hanging process counts as lost
JOIN_SECONDS = 90  # after which a process stops waiting for the other to start
END_SECONDS = 180  # within which all must have exited in any case
RECIPE = (
  '--config=configs/quickstart.py',
  f'--runs={",".join(RUNS)}',
  *(f'--config.runs.{name}.intervals.checkpoint={CHECKPOINT}' for name in RUNS),
  *(f'--config.runs.{name}.mesh.fsdp=2' for name in RUNS[:-1]),
  '--config.runs.bam_kv.mesh.expert=2',
)
DISTURBANCES: dict[str, Callable[[list[subprocess.Popen], random.Random], None]] = {
  'kill -9 of one': lambda both, chance: chance.choice(both).kill(),
  'kill -9 of both': lambda both, chance: [process.kill() for process in both],
  'SIGTERM to one': lambda both, chance: chance.choice(both).terminate(),
  'Ctrl-C to both': lambda both, chance: [process.send_signal(signal.SIGINT) for process in both],
  'one hangs': lambda both, chance: chance.choice(both).send_signal(signal.SIGSTOP),
}


def main() -> dict[str, Any]:
  """Trains, disturbs, compares, and prints the results."""
  if not _WORKDIR.value:
    raise UserError('--workdir is required: the folder for the runs.')
  # A shell that starts this in the background lets it ignore Ctrl-C, and what it starts too.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  workdir = Path(_WORKDIR.value).absolute()
  console = cli.console()
  quiet, chance = workdir / 'quiet', random.Random(_SEED.value)
  console.print(f'{quiet}: undisturbed.')
  _end(_start(quiet), None)
  facts: dict[str, Any] = dict(
    rounds=0, attempts=0, lost_steps=0, steps=0, events=collections.Counter(),
    statuses=collections.Counter(), largest_difference=0.0, equal_parameters=True,
    equal_results=True,
  )  # fmt: skip
  began = time.monotonic()
  while time.monotonic() < began + 60 * _MINUTES.value:
    facts['rounds'] += 1
    disturbed = workdir / f'disturbed_{facts["rounds"]}'
    shutil.rmtree(disturbed, ignore_errors=True)
    while not all((disturbed / name / 'result.json').exists() for name in RUNS):
      facts['attempts'] += 1
      before = {name: max(_losses(disturbed / name), default=0) for name in RUNS}
      event, told = _attempt(disturbed, chance, facts['statuses'])
      if event:
        facts['events'][event] += 1
      for name, step in re.findall(r'^(\w+): (?:resumes at step ([\d,]+)|starts)', told, re.M):
        lost = before[name] - int((step or '0').replace(',', ''))
        if lost > 2 * CHECKPOINT:  # the newest may be unfinished, but not the one before
          raise UserError(f'{name} has lost {lost} steps.')
        facts['lost_steps'] += lost
      console.print(f'{(time.monotonic() - began) / 60:5.1f} min: {event or "the recipe is done"}')
    for name in RUNS:
      _compare(disturbed / name, quiet / name, facts)
  facts['minutes'] = (time.monotonic() - began) / 60
  console.print_json(json.dumps(facts))
  return facts


def _start(workdir: Path) -> list[subprocess.Popen]:
  """Both processes of a job."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    coordinator = f'--coordinator=127.0.0.1:{probe.getsockname()[1]}'
  workdir.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, '-m', 'bam_jax.main', f'--workdir={workdir}', *RECIPE]
  command += [f'--config.steps={_STEPS.value}']
  command += [coordinator, '--process_count=2', f'--lost_timeout={LOST_SECONDS}']
  command += [f'--join_timeout={JOIN_SECONDS}']
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': '1',
    'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
  }
  both = []
  for number in range(2):
    with open(workdir / f'process_{number}.log', 'w', encoding='utf-8') as log:
      line = [*command, f'--process_id={number}']
      both.append(subprocess.Popen(line, env=environment, stdout=log, stderr=log))
  return both


def _attempt(
  workdir: Path, chance: random.Random, statuses: collections.Counter
) -> tuple[str | None, str]:
  """Starts a job and disturbs it, unless it ends before; what happened, and process 0's words."""
  both = _start(workdir)
  event, wait = chance.choice([*DISTURBANCES]), chance.expovariate(1 / _EVERY.value)
  try:
    try:
      both[0].wait(wait)
      event = None
    except subprocess.TimeoutExpired:
      DISTURBANCES[event](both, chance)
    statuses.update(_end(both, event))
  finally:
    for process in both:
      process.kill()
  logs = [(workdir / f'process_{n}.log').read_text(encoding='utf-8') for n in range(len(both))]
  # Python has its own for Ctrl-C while it imports.
  if any('Traceback' in log and 'KeyboardInterrupt' not in log for log in logs):
    raise UserError(f'After {event!r} a process prints a traceback: see {workdir}/process_*.log.')
  return event, logs[0]


def _end(both: list[subprocess.Popen], event: str | None) -> list[str]:
  """Waits for both; their exit statuses."""
  deadline = None if event is None else time.monotonic() + END_SECONDS
  if event == 'one hangs':  # itself it never ends: the other must
    while all(process.poll() is None for process in both):
      if time.monotonic() > deadline:
        raise UserError(f'A process that hangs keeps the other for over {END_SECONDS} s.')
      time.sleep(0.1)
    for process in both:
      if process.poll() is None:
        process.kill()
  for process in both:
    try:
      process.wait(None if deadline is None else max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
      raise UserError(f'After {event!r} a process has not ended in {END_SECONDS} s.') from None
  ended = [process.returncode for process in both]
  if event is None and any(ended):
    raise UserError(f'Undisturbed, the processes ended with {ended}: see their logs.')
  return [str(status) for status in ended]


def _losses(folder: Path) -> dict[int, float]:
  """Losses by step, as far as they were logged."""
  path = folder / 'metrics.jsonl'
  lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
  facts = [json.loads(line) for line in lines if line.endswith('}')]  # a kill may cut the last
  return {line['step']: line['loss'] for line in facts if 'loss' in line}


def _compare(mine: Path, other: Path, facts: dict[str, Any]) -> None:
  """Adds what a disturbed run shares with the undisturbed one."""
  losses, expected = _losses(mine), _losses(other)
  if losses.keys() != expected.keys():
    raise UserError(f'{mine} has logged different steps from {other}.')
  facts['steps'] += len(losses)
  differences = [abs(losses[step] - expected[step]) for step in losses]
  facts['largest_difference'] = max(facts['largest_difference'], *differences)
  results = [json.loads((path / 'result.json').read_text()) for path in (mine, other)]
  facts['equal_results'] &= results[0]['domains'] == results[1]['domains']
  facts['equal_parameters'] &= all(
    np.array_equal(a, b, equal_nan=True) for a, b in zip(_arrays(mine), _arrays(other))
  )


def _arrays(folder: Path) -> list[np.ndarray]:
  reader = checkpoint.open_params(folder, checkpoint.read_meta(folder).model)
  return [reader.read(path) for path in sorted(reader.specs)]


if __name__ == '__main__':
  cli.run(main)
