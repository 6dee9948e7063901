"""What a user may get wrong: one sentence, exit status 2, nothing made."""

import subprocess

import pytest


def refused(tpu, words, sentence, **env):
  done = tpu(*words, **env)
  assert done.returncode == 2, (done.returncode, done.stderr)
  assert sentence in done.stderr and not done.stdout
  assert len(done.stderr.splitlines()) == 1, done.stderr
  assert tpu.cloud.read()['created'] == []


SUBCOMMANDS = ['up', 'run', 'supervise', 'logs', 'status', 'ssh', 'down', 'ls']


@pytest.mark.parametrize('subcommand', [
  name if name == 'run' else pytest.param(name, marks=pytest.mark.slow) for name in SUBCOMMANDS
])  # fmt: skip
def test_no_project_no_credentials_and_help_that_needs_neither(tpu, subcommand):
  name = [] if subcommand == 'ls' else ['exp-1']
  words = [subcommand, *name, *(['--', 'true'] if subcommand in ('run', 'supervise') else [])]
  tpu.cloud.set(account='')
  refused(tpu, words, 'run gcloud auth login')
  tpu.cloud.set(project='')
  refused(tpu, words, 'set BAM_PROJECT, or give --project=PROJECT.')
  tpu.cloud.set(calls=[])
  done = tpu(subcommand, '--help', BAM_ZONES='', BAM_TYPE='')
  assert done.returncode == 0 and not done.stderr
  assert done.stdout.startswith(f'launch/tpu {subcommand}')
  assert tpu.cloud.read()['calls'] == []


def test_no_gcloud(tpu, tmp_path):
  for tool in ('bash', 'dirname', 'mktemp', 'rm'):
    found = subprocess.run(['which', tool], capture_output=True, text=True, check=True)
    (tmp_path / tool).symlink_to(found.stdout.strip())
  refused(tpu, ['ls'], 'gcloud is not installed', PATH=str(tmp_path))


@pytest.mark.parametrize('name', ['my run', '', 'Exp', 'a' * 39, '$(x)', '-x'])
def test_names_that_are_none(tpu, name):
  done = tpu('down', name)
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
  assert tpu.cloud.read()['calls'] == []


@pytest.mark.parametrize('words, sentence', [
  ('lift exp-1', 'lift is not a subcommand: give one of up, run, supervise, logs, status, ssh,'),
  ('up', 'The name of a TPU is required: launch/tpu up NAME.'),
  ('up exp-1 --type v4-8', '--type needs a value: --type=…'),
  ('run exp-1', 'A command is required: launch/tpu run NAME -- COMMAND …'),
  ('run exp-1 -- true', "There is no TPU 'exp-1' in zone-a, zone-b"),
  ('run exp-1 --commit=nothing -- true', '--commit=nothing is not a commit'),
  ('run exp-1 --detach --delete-on-exit -- true', 'choose one'),
  ('up exp-1 --type=', 'The type of the TPU is required: set BAM_TYPE'),
  ('up exp-1 --type=v4-4', 'v4 comes in multiples of 8 cores'),
  ('up exp-1 --type=tpu7x-8', 'TPU7x and later are not served by the Cloud TPU API'),
  ('up exp-1 --capacity=cheap', '--capacity=cheap: give on-demand, spot or reserved'),
  ('up exp-1 --wait=10m', "BAM_WAIT='10m' is not a whole number"),
])  # fmt: skip
def test_mistakes(tpu, words, sentence):
  refused(tpu, words.split(), sentence)


@pytest.mark.slow
@pytest.mark.parametrize('words', ['down exp-1', 'ls'])
def test_a_cloud_that_is_away_is_said_and_not_taken_for_an_empty_one(tpu, tmp_path, words):
  program = tmp_path / 'gcloud'
  program.write_text('#!/bin/sh\necho "ERROR: (gcloud) Connection refused" >&2\nexit 1\n')
  program.chmod(0o755)
  done = tpu(*words.split(), PATH=f'{tmp_path}:{tpu.env["PATH"]}', BAM_PROJECT='proj-1')
  assert done.returncode == 1 and 'Connection refused' in done.stderr, done.stderr
