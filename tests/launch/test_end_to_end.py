"""The quick start, small, over slices that are stopped and started."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT, Launcher, git, interrupt, wait_for

RUNS = ('seed', 'code', 'law', 'math', 'bam_kv', 'untrained')  # of the quick start
ASKED = f'--runs={",".join(RUNS)}'


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
def test_a_recipe_over_slices_stopped_and_started(folder, cloud, checkout, gcloud, tmp_path):
  """A TPU for each run, each with nothing of its own, and the results of one folder's runs."""
  tpu, workdir = Launcher(cloud, checkout, gcloud, tmp_path), folder / 'small'

  def start():
    flags = [f'--workdir={workdir}', '--type=v5e-1', '--mixture-type=v5e-4', ASKED]
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
  flags = ['--config=configs/quickstart.py:smoke', f'--workdir={tmp_path}/local', ASKED]
  command = [sys.executable, '-m', 'bam_jax.main', *flags]
  subprocess.run(command, cwd=checkout, check=True, capture_output=True)
  for run in RUNS:
    results = (json.loads((place / run / 'result.json').read_text()) for place in (
      workdir, tmp_path / 'local'
    ))  # fmt: skip
    assert len({json.dumps(result['domains']) for result in results}) == 1, run
  report = json.loads((workdir / 'report' / 'report.json').read_text())
  assert [row['run'] for row in report['rows']] == list(RUNS)
