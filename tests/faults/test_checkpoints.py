"""Checkpoints that a disk damages or a kill interrupts: what is lost, and what is said."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from bam_jax import checkpoint
from bam_jax.checkpoint import integrity
from tests.checkpoint.test_checkpoint import spoil
from tests.distributed import jobs
from tests.faults.conftest import SEED, assert_sentence
from tests.test_main import ROOT, assert_same_end, environment, run, start

pytestmark = pytest.mark.slow


def test_a_run_goes_on_from_the_checkpoint_before(text, undisturbed, copied):
  """As if it was killed before its result, and the disk then lost a bit or an end."""
  (copied / 'seed' / 'result.json').unlink()
  file = spoil(copied / 'seed' / 'checkpoints' / '12', 'params flipped')
  again = run(text, copied, *SEED)
  assert again.returncode == 0, again.stderr
  assert f'{copied}/seed/checkpoints/12 is damaged ({file}' in again.stderr
  assert 'seed: resumes at step 9 of 12' in again.stderr
  assert_same_end(copied, undisturbed, ['seed'])


def test_two_processes_go_on_from_the_checkpoint_before(text, tmp_path):
  """One reads the files, and what it finds both know."""
  whole, workdir = tmp_path / 'whole', tmp_path / 'damaged'
  with jobs.job(whole, text, 2, jobs.MESH, *SEED, steps=20) as both:
    both.succeeds()
  shutil.copytree(whole, workdir)
  (workdir / 'seed' / 'result.json').unlink()
  step = workdir / 'seed' / 'checkpoints' / '20'
  file = spoil(step, 'params cut')
  with jobs.job(workdir, text, 2, jobs.MESH, *SEED, steps=20) as both:
    told, _ = both.succeeds()
  assert f'{step} is damaged ({file} has' in told and 'resumes at step 10' in told
  jobs.assert_same_bits(workdir / 'seed', whole / 'seed')


def test_without_another_checkpoint_nobody_starts_anew_in_silence(text, copied):
  checkpoints = copied / 'seed' / 'checkpoints'
  (copied / 'seed' / 'result.json').unlink()
  shutil.rmtree(checkpoints / '9')
  spoil(checkpoints / '12', 'params flipped')
  assert_sentence(run(text, copied, *SEED), f'{checkpoints}/12 is damaged', 'from scratch')
  assert (checkpoints / '12').exists()


def test_other_commands_refuse_a_damaged_checkpoint(text, copied):
  spoil(copied / 'seed' / 'checkpoints' / '12', 'params flipped')
  for line in (
    ['bam_jax.generate', f'--checkpoint={copied}/seed', '--prompt=the'],
    ['bam_jax.convert', 'inspect', f'{copied}/seed'],
  ):
    done = subprocess.run(
      [sys.executable, '-m', *line], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert_sentence(done, f'{copied}/seed/checkpoints/12 is damaged', 'does not match its checksum')
  assert_sentence(run(text, copied, '--runs=code'), 'seed/checkpoints/12 is damaged')


def test_the_only_checkpoint_outlives_many_kills(text, undisturbed, tmp_path):
  """A run that keeps one checkpoint and is killed while it writes the next, again and again."""
  flags = [
    *SEED,
    '--config.runs.seed.intervals.checkpoint=1',
    '--config.runs.seed.intervals.keep=1',
    '--config.runs.seed.intervals.evaluate=0',
  ]
  checkpoints, chance = tmp_path / 'seed' / 'checkpoints', random.Random(0)
  for _ in range(12):
    before = checkpoint.finished_step(checkpoints) or 0
    if before == 12:
      break
    process = start(text, tmp_path, *flags)
    while (checkpoint.finished_step(checkpoints) or 0) <= before and process.poll() is None:
      time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = checkpoint.finished_step(checkpoints)
    assert newest is not None and newest > before
    whole = checkpoints / str(newest)
    integrity.check(whole)
  done = run(text, tmp_path, *flags)
  assert done.returncode == 0, done.stderr
  assert_same_end(tmp_path, undisturbed, ['seed'])
