"""The quick start, small, on workers that are taken away, and on slices that are stopped."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT, Launcher, git, interrupt, wait_for

RUNS = ('seed', 'code', 'law', 'math', 'btx', 'bam_shared_kv', 'bam_kv')


def free_port() -> int:
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    return server.getsockname()[1]


@pytest.fixture
def checkout(tmp_path):
  """What users have: a repository of all that a run needs."""
  checkout = tmp_path / 'my checkout'
  for name in ('bam_jax', 'configs', 'launch'):
    shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns('__pycache__'))
  shutil.copy(ROOT / 'requirements.txt', checkout)
  git(checkout, 'init', '--quiet')
  git(checkout, 'add', '--all')
  git(checkout, 'commit', '--quiet', '--message=All of it')
  return checkout


@pytest.mark.slow
def test_two_workers_one_preempted_the_recipe_ends(cloud, checkout, gcloud, tmp_path):
  tpu = Launcher(cloud, checkout, gcloud, tmp_path)
  workdir = tmp_path / 'the work'
  flags = [f'--config.runs.{run}.mesh.data=2' for run in RUNS]
  command = 'exec python -m bam_jax.main --process_id=$BAM_WORKER --process_count=$BAM_WORKERS "$@"'
  process = tpu.start(
    'supervise', 'exp-1', '--delete-on-exit', '--', 'bash', '-c', command, '-',
    '--config=configs/quickstart.py:smoke', f'--workdir={workdir}', '--lost_timeout=10',
    f'--coordinator=127.0.0.1:{free_port()}', *flags,
    BAM_POLL='1', BAM_GRACE='20', BAM_SETTLE='30',
  )  # fmt: skip
  wait_for(lambda: (workdir / 'seed' / 'result.json').exists(), seconds=600)
  kept = (workdir / 'seed' / 'result.json').stat().st_mtime_ns
  wait_for(lambda: (workdir / 'code').exists(), seconds=600)
  cloud.preempt('zone-a', 'exp-1')
  out, err = process.communicate(timeout=1500)
  assert process.returncode == 0, err + out
  assert 'restart 1 of 10' in err
  assert all((workdir / run / 'result.json').exists() for run in RUNS)
  assert (workdir / 'seed' / 'result.json').stat().st_mtime_ns == kept
  assert (workdir / 'report' / 'report.md').exists()
  assert cloud.read()['created'] == ['zone-a/exp-1'] * 2 and tpu.resources() == []


@pytest.mark.slow
def test_a_recipe_over_slices_stopped_and_started(folder, cloud, checkout, gcloud, tmp_path):
  """A TPU for each run, each with nothing of its own, and the results of one folder's runs."""
  tpu, workdir = Launcher(cloud, checkout, gcloud, tmp_path), folder / 'small'

  def start():
    flags = [f'--workdir={workdir}', '--type=v5e-1', '--mixture-type=v5e-4']
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    return tpu.start(
      'small', '--config=configs/quickstart.py:smoke', *flags,
      program='recipe', PATH=f'{gcloud}:{path}', BAM_POLL='1', BAM_GRACE='60',
    )  # fmt: skip

  process = start()
  wait_for(lambda: all((workdir / run / 'lock').exists() for run in RUNS[1:4]), seconds=300)
  code, out, err = interrupt(process)
  assert code == 130 and tpu.resources() == [], err + out
  assert (workdir / 'seed' / 'result.json').exists()
  process = start()
  out, err = process.communicate(timeout=900)
  assert process.returncode == 0, err + out
  assert 'recipe: seed is finished' in err and err.count('costs money until') == 0
  created = cloud.read()['created']
  assert created.count('zone-a/small-seed') == 1 and created.count('zone-a/small-bam-kv') == 1
  assert tpu.resources() == [] and not any((workdir / run / 'lock').exists() for run in RUNS)
  flags = ['--config=configs/quickstart.py:smoke', f'--workdir={tmp_path}/local']
  command = [sys.executable, '-m', 'bam_jax.main', *flags]
  subprocess.run(command, cwd=checkout, check=True, capture_output=True)
  for run in RUNS:
    results = (json.loads((place / run / 'result.json').read_text()) for place in (
      workdir, tmp_path / 'local'
    ))  # fmt: skip
    assert len({json.dumps(result['domains']) for result in results}) == 1, run
  report = json.loads((workdir / 'report' / 'report.json').read_text())
  assert [row['run'] for row in report['rows']] == list(RUNS)
