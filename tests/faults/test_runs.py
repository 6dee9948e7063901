"""Steps that would do harm, two jobs for one run, and what a run tells while it trains."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import SEED, assert_sentence
from tests.test_main import ROOT, assert_same_end, command, environment, run, start, wait_for_step

pytestmark = pytest.mark.slow
SKIP = '--config.runs.seed.guard.on_nan=skip'


def lines(folder: Path) -> list[dict]:
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def poisoned(text: Path, workdir: Path, steps: str, *flags: str):
  """Runs `main` on bad batches."""
  line = command(text, workdir, *SEED, *flags)[3:]
  return subprocess.run(
    [sys.executable, '-m', 'tests.faults.poisoned', steps, *line],
    cwd=ROOT, env=environment(), capture_output=True, text=True,
  )  # fmt: skip


def test_a_step_without_a_number_halts_and_may_be_skipped(text, tmp_path):
  """The guard may be set when it is needed, not only from the start."""
  halted = poisoned(text, tmp_path, '8')
  assert_sentence(halted, 'NaN or infinity at step 8', 'checkpoints/6', 'runs.seed.guard')
  resumed = poisoned(text, tmp_path, '8', SKIP)
  assert resumed.returncode == 0, resumed.stderr
  assert 'seed: skipped step 8' in resumed.stderr
  told = lines(tmp_path / 'seed')
  assert [line['step'] for line in told if line.get('skipped') == 1][0] == 8
  assert not [line for line in told if line['step'] == 8 and 'loss' in line]
  # Killed after that, the run still knows.
  shutil.copytree(tmp_path / 'seed', tmp_path / 'again' / 'seed')
  shutil.copytree(tmp_path / 'data', tmp_path / 'again' / 'data')
  (tmp_path / 'again' / 'seed' / 'result.json').unlink()
  shutil.rmtree(tmp_path / 'again' / 'seed' / 'checkpoints' / '12')
  again = poisoned(text, tmp_path / 'again', '8', SKIP)
  assert again.returncode == 0 and 'resumes at step 9' in again.stderr, again.stderr
  assert_same_end(tmp_path / 'again', tmp_path, ['seed'])
  for workdir in (tmp_path, tmp_path / 'again'):
    assert json.loads((workdir / 'seed' / 'result.json').read_text())['skipped'] == 1


def test_one_run_is_trained_by_one_job(text, tmp_path):
  flags = [*SEED, f'--config.runs.seed.tokens={5000 * 64}']
  with start(text, tmp_path, *flags) as first:
    wait_for_step(tmp_path / 'seed', 4, first)
    second = run(text, tmp_path, *flags)
    words = f'{tmp_path}/seed is being trained by process {first.pid} on '
    assert_sentence(second, words, 'or another --workdir')
    assert first.poll() is None
    first.kill()
  # The lock went with it.
  with start(text, tmp_path, *flags) as third:
    told = [third.stderr.readline() for _ in range(2)]
    third.kill()
  assert 'seed: resumes at step' in ''.join(told)
