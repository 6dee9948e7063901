"""Runs whose workdir is in a bucket end as those in a folder do, to the last bit."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bam_jax import checkpoint
from bam_jax.files import claims
from tests import test_main
from tests.gcs.conftest import command, files, holding
from tests.test_main import assert_same_end, run, start

SEED = ('--runs=seed',)
pytestmark = pytest.mark.slow


@pytest.fixture(scope='package')
def undisturbed(text, tmp_path_factory) -> Path:
  """A folder in which the first two runs went well."""
  workdir = tmp_path_factory.mktemp('undisturbed')
  done = run(text, workdir, '--runs=seed,code')
  assert done.returncode == 0, done.stderr
  return workdir


def wait_for(what, process: subprocess.Popen) -> None:
  deadline = time.monotonic() + 120
  while not what():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.02)


def test_killed_while_a_checkpoint_is_written(folder, text, undisturbed):
  with holding('seed/checkpoints/6/commit_success') as held:
    killed = start(text, folder, *SEED)
    wait_for(held, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
  steps = folder / 'seed' / 'checkpoints'
  assert (steps / '6').is_dir() and checkpoint.finished_step(steps) == 3
  assert (folder / 'seed' / claims.NAME).exists()
  resumed = run(text, folder, *SEED)
  assert resumed.returncode == 0, resumed.stderr
  assert 'seed: resumes at step 3' in resumed.stderr
  assert_same_end(folder, undisturbed, ('seed',))
  kept = {name.split('/')[2] for name in files(folder) if name.startswith('seed/checkpoints/')}
  assert kept == {'9', '12'}
  found = files(folder)
  assert 'report/report.md' in found and f'seed/{claims.NAME}' not in found
  report = json.loads((folder / 'report' / 'report.json').read_text())
  assert all(
    (folder / 'report' / name).read_bytes()[:4] == b'\x89PNG' for name in report['pictures']
  )
  # One file of events an attempt.
  assert len([name for name in found if name.startswith('seed/tensorboard/')]) == 2


def test_stopped_and_continued_elsewhere(folder, text, undisturbed, tmp_path, monkeypatch):
  """SIGTERM saves; a machine that has nothing of the first one goes on, and profiles."""
  stopped = start(text, folder, *SEED)
  with holding('/6/commit_success') as held:
    wait_for(held, stopped)
    stopped.send_signal(signal.SIGTERM)
    time.sleep(0.2)
  _, stderr = stopped.communicate(timeout=60)
  assert stopped.returncode == 128 + signal.SIGTERM, stderr
  assert 'the same command resumes' in stderr
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  flags = ('--runs=seed,code', '--config.runs.code.watch.profile_from=5')
  resumed = run(text, folder, *flags)
  assert resumed.returncode == 0, resumed.stderr
  assert 'seed: resumes at step' in resumed.stderr and 'Preparing' not in resumed.stderr
  assert_same_end(folder, undisturbed, ('seed', 'code'))
  assert any(name.endswith('.xplane.pb') for name in files(folder / 'code' / 'profile'))
  again = run(text, folder, *flags)
  assert again.returncode == 0 and again.stderr.count('skipped') == 2


def test_every_command_opens_a_checkpoint_of_a_bucket(folder, text, undisturbed, tmp_path):
  assert run(text, folder, '--runs=seed,code').returncode == 0
  made = folder / 'made'
  sources = [f'--from={folder}/seed', f'--from={folder}/code']
  done = command('convert', 'upcycle', *sources, '--method=btx', f'--output={made}')
  assert done.returncode == 0, done.stderr
  meta = checkpoint.read_meta(made)
  assert [source.path for source in meta.manifest.sources] == [
    f'{folder}/{run}/checkpoints/12' for run in ('seed', 'code')
  ]
  local = [f'--from={undisturbed}/seed', f'--from={undisturbed}/code']
  done = command('convert', 'upcycle', *local, '--method=btx', f'--output={tmp_path}/made')
  assert done.returncode == 0, done.stderr
  for module, *flags in (
    ('generate', '--prompt=the whale', '--max_new_tokens=4'),
    ('evaluate', f'--data={undisturbed}/data', '--json=-'),
  ):
    outputs = []
    for path in (made, tmp_path / 'made'):
      done = command(module, f'--checkpoint={path}', *flags)
      assert done.returncode == 0, done.stderr
      outputs.append(done.stdout.replace(str(path), 'PATH'))
    assert outputs[0] == outputs[1] != ''
  done = command('convert', 'inspect', str(made), str(tmp_path / 'made'))
  assert done.returncode == 0, done.stderr
  exported = command('convert', 'export-hf', f'--checkpoint={made}', f'--output={tmp_path}/hf')
  assert exported.returncode == 0, exported.stderr
  assert (tmp_path / 'hf' / 'config.json').exists()


def test_stopped_while_it_waits_for_a_lease(folder, text):
  (folder / 'seed').mkdir(parents=True)
  (folder / 'seed' / claims.NAME).write_text('[')
  waiting = start(text, folder, *SEED)
  assert any('waiting up to 60 s' in line for line in waiting.stderr)
  asked = time.monotonic()
  waiting.send_signal(signal.SIGINT)
  _, stderr = waiting.communicate(timeout=60)
  assert waiting.returncode == 128 + signal.SIGINT
  assert time.monotonic() - asked < claims.LEASE_SECONDS / 2
  assert stderr == 'Stopped by SIGINT; the same command resumes from here.\n'
  assert (folder / 'seed' / claims.NAME).read_text() == '['


def test_what_is_not_there_is_one_sentence(service, text, folder):
  done = run(text, 'gs://nowhere/run', *SEED)
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert 'gs://nowhere cannot be accessed: check its name' in done.stderr.splitlines()[-1]
  done = command('generate', f'--checkpoint={folder}/none', '--prompt=x')
  assert done.returncode == 2
  assert f'{folder}/none holds no checkpoint' in done.stderr.splitlines()[-1]
  # As on a machine without the extra `gcs`.
  program = """
import runpy, sys
sys.modules['gcsfs'] = None
sys.argv[1:] = ['inspect', 'gs://bucket/x']
runpy.run_module('bam_jax.convert', run_name='__main__')
"""
  done = subprocess.run(
    [sys.executable, '-c', program], cwd=test_main.ROOT, env=test_main.environment(),
    capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 2
  assert 'is in a bucket, which requires gcsfs: pip install' in done.stderr.splitlines()[-1]
