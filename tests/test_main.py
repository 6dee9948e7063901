"""`main` as its users run it: a whole process, killed, stopped, repeated, misused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from bam_jax import checkpoint

ROOT = Path(__file__).parent.parent
RUNS = ('seed', 'code', 'btx', 'bam_shared_kv', 'bam_kv_experts')
CACHE = tempfile.TemporaryDirectory(prefix='bam_jax_test_')  # which goes with this process


def command(text: Path, workdir: Path, *flags: str) -> list[str]:
  recipe = f'--config={ROOT}/tests/assets/tiny.py:{text}'
  return [sys.executable, '-m', 'bam_jax.main', recipe, f'--workdir={workdir}', *flags]


def run(text: Path, workdir: Path, *flags: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    command(text, workdir, *flags), cwd=ROOT, env=environment(), capture_output=True, text=True,
    timeout=300,
  )  # fmt: skip


def environment() -> dict[str, str]:
  """One device, and a cache of steps, compiled fast, that all these processes share."""
  kept = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_NUM_CPU_DEVICES')}
  return kept | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': CACHE.name,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
  }


@pytest.fixture(scope='module')
def undisturbed(text, tmp_path_factory) -> Path:
  """A workdir in which everything went well."""
  workdir = tmp_path_factory.mktemp('undisturbed')
  done = run(text, workdir)
  assert done.returncode == 0, done.stderr
  return workdir


def final_params(workdir: Path, name: str) -> dict[str, np.ndarray]:
  reader = checkpoint.open_params(workdir / name, checkpoint.read_meta(workdir / name).model)
  return {path: reader.read(path) for path in reader.specs}


def assert_same_end(workdir: Path, reference: Path, names=RUNS) -> None:
  """Parameters, metrics and held-out results are equal to the last bit."""
  for name in names:
    mine, other = final_params(workdir, name), final_params(reference, name)
    same = jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), mine, other)
    assert all(jax.tree.leaves(same)), (name, same)
    results = [json.loads((w / name / 'result.json').read_text()) for w in (workdir, reference)]
    assert results[0]['domains'] == results[1]['domains']
    assert losses(workdir / name) == losses(reference / name)


def losses(folder: Path) -> dict[int, float]:
  lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  steps = [line['step'] for line in lines if 'loss' in line]
  assert len(steps) == len(set(steps)), 'a step is told twice'
  return {line['step']: line['loss'] for line in lines if 'loss' in line}


def test_kill_and_resume_is_bitwise_equal(text, undisturbed, tmp_path):
  """Killed without warning in three runs of one graph, some while a checkpoint is written."""
  for victim, step in (('seed', 4), ('code', 11), ('bam_kv_experts', 7)):
    killed = start(text, tmp_path)
    wait_for_step(tmp_path / victim, step, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / victim / 'result.json').exists(), 'killed too late to prove anything'
  resumed = run(text, tmp_path)
  assert resumed.returncode == 0, resumed.stderr
  assert_same_end(tmp_path, undisturbed)
  again = run(text, tmp_path)
  assert again.returncode == 0 and again.stderr.count('skipped') == len(RUNS)


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(text, undisturbed, tmp_path):
  for victim, signum in (('seed', signal.SIGINT), ('code', signal.SIGTERM)):
    stopped = start(text, tmp_path)
    wait_for_step(tmp_path / victim, 1, stopped)
    stopped.send_signal(signum)
    _, stderr = stopped.communicate(timeout=60)
    assert stopped.returncode == 128 + signum
    assert 'the same command resumes' in stderr and 'Traceback' not in stderr
    assert checkpoint.finished_step(tmp_path / victim / 'checkpoints') < 12
  resumed = run(text, tmp_path)
  assert resumed.returncode == 0, resumed.stderr
  assert 'code: resumes at step' in resumed.stderr
  assert_same_end(tmp_path, undisturbed)


@pytest.mark.slow
def test_ten_signals_at_random_moments(text, tmp_path):
  """From the first import to the report: whenever SIGTERM comes, the end is the undisturbed one."""
  flags = [
    '--runs=seed',
    f'--config.runs.seed.tokens={300 * 64}',
    '--config.runs.seed.intervals.evaluate=0',
    '--config.runs.seed.intervals.checkpoint=100000',  # only for the signals
  ]
  undisturbed, stopped = tmp_path / 'undisturbed', tmp_path / 'stopped'
  began = time.monotonic()
  assert run(text, undisturbed, *flags).returncode == 0
  seconds = time.monotonic() - began
  chance, ends = random.Random(0), []
  for _ in range(10):
    process = start(text, stopped, *flags)
    time.sleep(chance.uniform(0, seconds))
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    # Before and after the training Python's own handler ends it; 0: it had ended.
    assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM, 0), stderr
    ends.append(process.returncode)
    if (stopped / 'seed' / 'result.json').exists():
      assert_same_end(stopped, undisturbed, ['seed'])
      shutil.rmtree(stopped)
  assert 128 + signal.SIGTERM in ends
  assert run(text, stopped, *flags).returncode == 0
  assert_same_end(stopped, undisturbed, ['seed'])


def start(text: Path, workdir: Path, *flags: str) -> subprocess.Popen:
  return subprocess.Popen(
    command(text, workdir, *flags), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
  )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
  """Until a run has logged a step."""
  metrics, line = folder / 'metrics.jsonl', f'{{"step": {step}, "loss"'
  deadline = time.monotonic() + 120
  while not (metrics.exists() and line in metrics.read_text()):
    assert process.poll() is None, 'ended before the moment to disturb it'
    assert time.monotonic() < deadline
    time.sleep(0.002)


@pytest.mark.slow
def test_two_jobs_train_different_runs_of_one_workdir(text, undisturbed, tmp_path):
  assert run(text, tmp_path, '--runs=seed,code').returncode == 0
  jobs = [start(text, tmp_path, f'--runs={name}') for name in ('btx', 'bam_kv_experts')]
  ends = [job.communicate(timeout=300)[1] for job in jobs]
  assert [job.returncode for job in jobs] == [0, 0], ends
  assert_same_end(tmp_path, undisturbed, ('seed', 'code', 'btx', 'bam_kv_experts'))


@pytest.mark.parametrize('flag, sentence', [
  ('--config=nowhere.py', '--config=nowhere.py cannot be read'),
  ('--runs=sead', "--runs names 'sead'; the recipe has seed"),
  ('--runs=code', "add 'seed' to --runs"),
  ('--workdir=', '--workdir is required'),
  ('--workdir=s3://bucket/runs', 'is neither a folder nor gs://BUCKET'),
  ('--config.model.head_dim=7', 'head_dim=7 is odd'),
])  # fmt: skip
def test_a_mistake_is_one_sentence_and_status_2(server, text, tmp_path, flag, sentence):
  assert_refused(server.run('main', *command(text, tmp_path, flag)[3:]), sentence)


@pytest.mark.slow
@pytest.mark.parametrize('flag, sentence', [
  ('--config.runs.code.schedule.peak_learning_rate=0.5', 'peak_learning_rate: 0.01 -> 0.5'),
  ('--config.runs.seed.tokens=640', 'total_steps: 12 -> 10'),
])  # fmt: skip
def test_what_is_finished_is_not_changed(server, text, undisturbed, flag, sentence):
  assert_refused(server.run('main', *command(text, undisturbed, flag)[3:]), sentence)


def assert_refused(done, sentence: str) -> None:
  assert done.status == 2, done.stderr
  assert 'Traceback' not in done.stderr and sentence in done.stderr, done.stderr
  assert len([x for x in done.stderr.splitlines() if not x.startswith('Preparing ')]) == 1


def test_divergence_halts_and_names_the_last_good_checkpoint(text, tmp_path):
  done = run(text, tmp_path, '--runs=seed', '--config.runs.seed.schedule.peak_learning_rate=1e30')
  assert done.returncode == 2
  assert 'NaN or infinity at step' in done.stderr and 'Traceback' not in done.stderr
