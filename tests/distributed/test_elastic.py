"""A run goes on with other processes and another mesh, and reads on where it stopped."""

import json
import signal

import numpy as np
import pytest

from tests.distributed.jobs import job, losses, params_of

STEPS = 60


def record(text, workdir, processes, mesh, *flags, stop_after=None) -> list[list]:
  """Runs the seed, stopped by a signal soon after a step if asked; rows and domains by step."""
  files = [workdir.with_name(f'{workdir.name}-{processes}-{mesh}-{i}') for i in range(processes)]
  main = ('-m', 'tests.distributed.recorded', str(files[0])[:-1] + '{process}')
  with job(
    workdir, text, processes, mesh, '--runs=seed', *flags, steps=STEPS, main=main
  ) as started:
    if stop_after:
      started.wait_for_step(workdir / 'seed', stop_after)
      started.processes[-1].send_signal(signal.SIGTERM)
      assert [status for status, _ in started.ends()] == [128 + signal.SIGTERM] * processes
    else:
      started.succeeds()
  parts = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
  assert len({len(part) for part in parts}) == 1, 'processes trained different numbers of steps'
  return [[sum(column, []) for column in zip(*step)] for step in zip(*parts)]


@pytest.fixture(scope='module')
def undisturbed(text, tmp_path_factory):
  """What one process on one device trains on, step by step, and its workdir."""
  workdir = tmp_path_factory.mktemp('undisturbed') / 'workdir'
  return record(text, workdir, 1, '1x1x1x1'), workdir


def assert_same_run(recorded, workdir, undisturbed):
  """Every token once, in its place, and the same model but for the order of sums."""
  assert recorded == undisturbed[0]
  assert len(recorded) == STEPS
  mine, other = losses(workdir / 'seed'), losses(undisturbed[1] / 'seed')
  assert mine.keys() == other.keys()
  np.testing.assert_allclose([*mine.values()], [*other.values()], rtol=1e-4)
  mine, other = params_of(workdir / 'seed'), params_of(undisturbed[1] / 'seed')
  for path in other:
    np.testing.assert_allclose(mine[path], other[path], rtol=0, atol=1e-3, err_msg=path)


@pytest.mark.slow
def test_from_four_processes_to_one_to_two(text, undisturbed, tmp_path):
  workdir = tmp_path / 'workdir'
  recorded = record(text, workdir, 4, '4x1x1x1', stop_after=4)
  # On fewer devices a run may need less memory: what it recomputes and adds up in parts may change.
  smaller = [f'--config.runs.seed.{key}' for key in ('compute.remat=full', 'grad_accum_steps=2')]
  recorded += record(text, workdir, 1, '1x2x1x2', *smaller, stop_after=len(recorded) + 4)
  recorded += record(text, workdir, 2, '1x1x2x2')
  assert_same_run(recorded, workdir, undisturbed)
