"""What a user may get wrong: one sentence, exit status 2, nothing made."""

import subprocess
from pathlib import Path

import pytest

from tests.launch.conftest import interrupt, wait_for

VERBS = ['up', 'run', 'supervise', 'logs', 'status', 'ssh', 'down']
ALL = [*VERBS, 'ls']


def arguments(verb, name='exp-1'):
  """A complete command line of a verb."""
  return [
    verb,
    *([] if verb == 'ls' else [name]),
    *(['--', 'true'] if verb in ('run', 'supervise') else []),
  ]


def refused(tpu, words, sentence, **env):
  done = tpu(*words, **env)
  assert done.returncode == 2, (done.returncode, done.stderr)
  assert sentence in done.stderr and not done.stdout
  assert len(done.stderr.splitlines()) == 1, done.stderr
  assert tpu.cloud.read()['created'] == []


@pytest.mark.parametrize('verb', ALL)
def test_no_project(tpu, verb):
  tpu.cloud.set(project='')
  refused(tpu, arguments(verb), 'Which project? Set BAM_PROJECT, or give --project=PROJECT.')


@pytest.mark.parametrize('verb', ALL)
def test_no_credentials(tpu, verb):
  tpu.cloud.set(account='')
  refused(tpu, arguments(verb), 'run gcloud auth login')


def test_no_permission(tpu):
  refused(tpu, ['up', 'exp-1', '--project=other'], "may not use Cloud TPUs in project 'other'")
  tpu.cloud.plan('zone-a', 'denied')
  done = tpu('up', 'exp-1')
  assert done.returncode == 2 and "may not use Cloud TPUs in project 'proj-1'" in done.stderr
  assert tpu.resources() == []


def test_no_gcloud(tpu, tmp_path):
  tools = tmp_path / 'tools'
  tools.mkdir()
  for tool in ('bash', 'dirname', 'mktemp', 'rm'):
    found = subprocess.run(['which', tool], capture_output=True, text=True, check=True)
    (tools / tool).symlink_to(found.stdout.strip())
  refused(tpu, ['ls'], 'gcloud is not installed', PATH=str(tools))


@pytest.mark.parametrize(
  'name', ['my run', '', 'Exp', '1st', 'x-', 'a' * 39, 'a;rm -rf b', '$(x)', '-x', 'é']
)
@pytest.mark.parametrize('verb', ['up', 'down'])
def test_names_that_are_none(tpu, verb, name):
  done = tpu(verb, name)
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
  assert tpu.cloud.read()['calls'] == []


@pytest.mark.parametrize(
  'words, sentence',
  [
    ([], 'give one of up, run, supervise, logs, status, ssh, down, ls'),
    (['lift', 'exp-1'], 'lift is no verb: give one of up,'),
    (['up'], 'Which TPU? launch/tpu up NAME.'),
    (['up', 'exp-1', 'exp-2'], "Unexpected argument 'exp-2': a command comes after --."),
    (['up', 'exp-1', '--typ=v4-8'], 'up has no flag --typ=…'),
    (['up', 'exp-1', '--type', 'v4-8'], '--type needs a value: --type=…'),
    (['up', 'exp-1', '--detach'], 'up has no flag --detach'),
    (['up', 'exp-1', '--', 'true'], 'up takes no command'),
    (['run', 'exp-1'], 'Run what? launch/tpu run NAME -- COMMAND …'),
    (['run', 'exp-1', '--', 'true'], "There is no TPU 'exp-1' in zone-a, zone-b"),
    (['run', 'exp-1', '--commit=nothing', '--', 'true'], '--commit=nothing names no commit'),
    (['run', 'exp-1', '--requirements=no.txt', '--', 'true'], '--requirements=no.txt is not in'),
    (['run', 'exp-1', '--detach', '--delete-on-exit', '--', 'true'], 'choose one'),
    (['status', 'exp-1'], "There is no TPU 'exp-1'"),
    (['up', 'exp-1', '--zones='], 'Which zones? Set BAM_ZONES'),
    (['up', 'exp-1', '--type='], 'Which TPU? Set BAM_TYPE'),
    (['up', 'exp-1', '--type=v4-4'], 'v4 comes in multiples of 8 cores'),
    (['up', 'exp-1', '--type=v6e-12'], 'v6e comes in 1, 4, 8, 16, 32, 64, 128 or 256 chips'),
    (['up', 'exp-1', '--type=h100-8'], 'is no TPU of this API'),
    (['up', 'exp-1', '--type=tpu7x-8'], 'TPU7x and later are not served by the Cloud TPU API'),
    (['up', 'exp-1', '--capacity=cheap'], '--capacity=cheap: give on-demand, spot or reserved'),
    (['up', 'exp-1', '--slices=0'], 'BAM_SLICES=0: there is at least one'),
    (['up', 'exp-1', '--wait=10m'], "BAM_WAIT='10m' is not a whole number"),
    (['up', 'exp-1', '--poll=x'], "BAM_POLL='x' is not a number"),
    (['logs', 'exp-1', '--lines=all'], '--lines=all is not a number'),
    (['ls', 'exp-1'], "Unexpected argument 'exp-1'"),
  ],
)  # fmt: skip
def test_mistakes(tpu, words, sentence):
  refused(tpu, words, sentence)


def test_workers_and_slices_that_are_not_there(tpu):
  tpu('up', 'exp-1')
  for flag, sentence in [
    ('--worker=2', '--worker=2: a slice of exp-1 has 2 workers, counted from 0.'),
    ('--slice=1', '--slice=1: exp-1 has 1 slices, counted from 0.'),
  ]:
    done = tpu('ssh', 'exp-1', flag, '--', 'true')
    assert done.returncode == 2 and sentence in done.stderr


@pytest.mark.parametrize('verb', ALL)
def test_help_needs_nothing(tpu, verb):
  tpu.cloud.set(project='', account='')
  done = tpu(verb, '--help', BAM_ZONES='', BAM_TYPE='')
  assert done.returncode == 0 and done.stdout.startswith(f'launch/tpu {verb}') and not done.stderr
  assert tpu.cloud.read()['calls'] == []
  assert max(map(len, done.stdout.splitlines())) <= 106


def test_a_cloud_that_is_away_is_said_and_not_taken_for_an_empty_one(tpu):
  tpu('up', 'exp-1')
  broken = tpu.cloud.folder / 'broken'
  broken.mkdir()
  program = broken / 'gcloud'
  program.write_text('#!/bin/sh\necho "ERROR: (gcloud) Connection refused" >&2\nexit 1\n')
  program.chmod(0o755)
  for verb in ('down', 'ls', 'status'):
    done = tpu(*arguments(verb), PATH=f'{broken}:{tpu.env["PATH"]}', BAM_PROJECT='proj-1')
    assert done.returncode == 1 and 'Connection refused' in done.stderr, done.stderr


def test_ctrl_c_leaves_no_temporary_files(tpu):
  tpu.cloud.plan('zone-a', 'waiting')
  process = tpu.start('up', 'exp-1')
  wait_for(lambda: tpu.cloud.read()['created'])
  assert interrupt(process)[0] == 130
  assert list(Path(tpu.env['TMPDIR']).iterdir()) == []
