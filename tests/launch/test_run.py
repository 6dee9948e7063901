"""`run`, `logs`, `status`, `ssh`, `supervise`: workers are folders, their processes are real."""

from pathlib import Path

import pytest

from tests.launch.conftest import DEADLINE, git, interrupt, wait_for

# Says what it is, and waits for a file in its worker's home, which says how it ends: for its
# content, since the file is there before it is written.
WAIT = """
echo "worker $BAM_WORKER of $BAM_WORKERS"
until [[ -s ~/go ]]; do sleep 0.05; done
exit $(<~/go)
"""


@pytest.fixture
def two(tpu):
  """A TPU of two workers that is up."""
  assert tpu('up', 'exp-1').returncode == 0
  return tpu


def home(tpu, worker, node='exp-1', zone='zone-a'):
  return tpu.cloud.home(zone, node, worker)


def started(tpu, workers=2, **where):
  """Whether the command has begun on all workers."""
  return all(list(home(tpu, w, **where).glob('.bam/run/*/log')) for w in range(workers))


def running(tpu, worker, **where):
  """Whether a command of a worker is alive and writes no status yet."""
  runs = list(home(tpu, worker, **where).glob('.bam/run/*'))
  return any((run / 'pid').exists() and not (run / 'exit').exists() for run in runs)


def exits(tpu, **where):
  return [
    int(file.read_text())
    for worker in range(2)
    for file in home(tpu, worker, **where).glob('.bam/run/*/exit')
  ]


def test_run_sends_the_commit_and_runs_the_same_on_every_worker(two):
  words = ["it's", 'two  spaces', '$HOME `ls` "quoted"', 'line\nbreak', '*', '']
  program = 'import os, sys; print(open("words.txt").read() + repr(sys.argv[1:]))'
  done = two('run', 'exp-1', '--', 'python', '-c', program, *words)
  assert done.returncode == 0, done.stderr
  assert done.stdout == f'sent with the commit\n{words!r}\n'
  assert exits(two) == [0, 0]
  logs = [file.read_text() for w in range(2) for file in home(two, w).glob('.bam/run/*/log')]
  assert logs == [done.stdout] * 2
  assert 'costs money until: launch/tpu down exp-1' in done.stderr


@pytest.mark.slow
def test_the_environment_is_made_once_for_the_same_requirements(two, house):
  made = lambda: [(home(two, w) / 'uv.log').read_text().count('venv ') for w in range(2)]
  for expected in (1, 1):
    assert two('run', 'exp-1', '--', 'true').returncode == 0
    assert made() == [expected] * 2
  before = git(house, 'rev-parse', 'HEAD')
  try:
    (house / 'requirements.txt').write_text('numpy\nscipy\n')
    unsent = two('run', 'exp-1', '--', 'cat', 'requirements.txt')
    assert unsent.stdout == 'numpy\n' and 'uncommitted changes are not sent' in unsent.stderr
    assert made() == [1, 1]
    git(house, 'commit', '--quiet', '--all', '--message=More')
    assert two('run', 'exp-1', '--', 'cat', 'requirements.txt').stdout == 'numpy\nscipy\n'
    assert made() == [2, 2]
    old = two('run', 'exp-1', f'--commit={before}', '--', 'cat', 'requirements.txt')
    assert old.stdout == 'numpy\n' and made() == [2, 2]
    log = (home(two, 0) / 'uv.log').read_text()
    assert log.count('venv --quiet --python 3.12 ') == 2
    assert log.count('/launch/requirements.txt') == 2
  finally:
    git(house, 'reset', '--quiet', '--hard', before)


@pytest.mark.slow
def test_requirements_that_do_not_install(two, house):
  before = git(house, 'rev-parse', 'HEAD')
  try:
    (house / 'launch' / 'requirements.txt').write_text('no-such-package\n')
    git(house, 'commit', '--quiet', '--all', '--message=Wrong')
    done = two('run', 'exp-1', '--', 'true')
    assert done.returncode == 1 and 'no-such-package was not found' in done.stderr
    assert 'the workers could not start' in done.stderr
  finally:
    git(house, 'reset', '--quiet', '--hard', before)


def test_workers_of_several_slices_have_numbers_of_their_own(tpu):
  tpu('up', 'many', '--slices=2')
  done = tpu('run', 'many', '--', 'bash', '-c', 'echo $BAM_SLICE $BAM_WORKER $BAM_WORKERS')
  assert done.returncode == 0, done.stderr
  logs = [
    next(home(tpu, w, f'many-{s}').glob('.bam/run/*/log')).read_text()
    for s in range(2)
    for w in range(2)
  ]
  assert logs == ['0 0 4\n', '0 1 4\n', '1 2 4\n', '1 3 4\n']


@pytest.mark.parametrize('failing, code', [(1, 7), (1, 143)])
def test_a_worker_that_fails_stops_the_others(two, failing, code):
  process = two.start('run', 'exp-1', '--', 'bash', '-c', WAIT)
  wait_for(lambda: started(two))
  (home(two, failing) / 'go').write_text(str(code))
  _, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == code
  assert sorted(exits(two)) == sorted([code, 143])  # the other one by SIGTERM
  assert f'worker 0/{failing} failed with exit status {code}' in err


@pytest.mark.slow
def test_a_worker_that_does_not_stop_is_killed(two):
  stubborn = 'trap "" TERM; ' + WAIT
  process = two.start('run', 'exp-1', '--', 'bash', '-c', stubborn)
  wait_for(lambda: started(two))
  (home(two, 1) / 'go').write_text('3')
  process.communicate(timeout=DEADLINE)
  assert process.returncode == 3 and not running(two, 1)
  status = two('status', 'exp-1').stdout.splitlines()
  assert [line.split()[2:4] for line in status[1:]] == [['exited', '137'], ['exited', '3']]


def test_preemption_in_the_middle_of_run(two):
  process = two.start('run', 'exp-1', '--', 'bash', '-c', WAIT)
  wait_for(lambda: started(two))
  two.cloud.preempt('zone-a', 'exp-1')
  _, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 143
  assert 'exp-1 is not there any more: its request is SUSPENDED' in err
  assert 'costs money until' in err or two.resources() == []


def test_ctrl_c_in_run_lets_the_command_save(two):
  saving = 'trap "echo saved; exit 143" TERM; ' + WAIT
  process = two.start('run', 'exp-1', '--', 'bash', '-c', saving)
  wait_for(lambda: started(two))
  code, _, err = interrupt(process)
  assert code == 130 and exits(two) == [143, 143]
  assert 'saved' in next(home(two, 1).glob('.bam/run/*/log')).read_text()
  assert 'costs money until: launch/tpu down exp-1' in err
  assert two.resources() == ['zone-a/exp-1']


@pytest.mark.parametrize(
  'verb, how',
  [
    ('run', 'end'),
    ('supervise', 'ctrl-c'),
    pytest.param('run', 'failure', marks=pytest.mark.slow),
    pytest.param('run', 'ctrl-c', marks=pytest.mark.slow),
    pytest.param('supervise', 'end', marks=pytest.mark.slow),
    pytest.param('supervise', 'failure', marks=pytest.mark.slow),
  ],
)
def test_delete_on_exit(two, verb, how):
  process = two.start(verb, 'exp-1', '--delete-on-exit', '--', 'bash', '-c', WAIT)
  wait_for(lambda: started(two))
  if how == 'ctrl-c':
    assert interrupt(process)[0] == 130
  else:
    for worker in range(2):
      (home(two, worker) / 'go').write_text('0' if how == 'end' else '5')
    process.communicate(timeout=DEADLINE)
    assert process.returncode == (0 if how == 'end' else 5)
  assert two.resources() == []


def test_detach_then_status_logs_and_the_same_command_again(two):
  command = ['run', 'exp-1', '--', 'bash', '-c', WAIT]
  assert two('run', 'exp-1', '--detach', *command[2:]).returncode == 0
  wait_for(lambda: started(two))
  status = two('status', 'exp-1').stdout.splitlines()
  assert status[0] == 'exp-1  zone-a  v5litepod-8  ACTIVE'
  assert [line.split()[::2] for line in status[1:]] == [
    ['0/0', 'running', '0', '2'],
    ['0/1', 'running', '1', '2'],
  ]
  for verb, *flags in (('run',), ('run', '--delete-on-exit'), ('supervise', '--delete-on-exit')):
    other = two(verb, 'exp-1', *flags, '--', 'true')
    assert other.returncode == 2 and 'exp-1 is running something else' in other.stderr
  assert two.resources() == ['zone-a/exp-1']
  logs, again = two.start('logs', 'exp-1', '--worker=1'), two.start(*command)
  wait_for(lambda: 'following it' in again.stderr.readline())
  for worker in range(2):
    (home(two, worker) / 'go').write_text('0')
  assert logs.communicate(timeout=DEADLINE)[0] == 'worker 1 of 2\n' and logs.returncode == 0
  assert again.communicate(timeout=DEADLINE)[0] == 'worker 0 of 2\n' and again.returncode == 0
  assert exits(two) == [0, 0]


@pytest.mark.slow
def test_replace_stops_what_is_running(two):
  two('run', 'exp-1', '--detach', '--', 'bash', '-c', WAIT)
  wait_for(lambda: started(two))
  done = two('run', 'exp-1', '--replace', '--', 'echo', 'the new one')
  assert (done.returncode, done.stdout) == (0, 'the new one\n'), done.stderr
  assert sorted(exits(two)) == [0, 0, 143, 143]


@pytest.mark.slow
def test_ctrl_c_in_logs_leaves_the_command(two):
  two('run', 'exp-1', '--detach', '--', 'bash', '-c', WAIT)
  wait_for(lambda: started(two))
  process = two.start('logs', 'exp-1')
  assert process.stdout.readline() == 'worker 0 of 2\n'
  assert interrupt(process)[0] != 0
  assert running(two, 0) and running(two, 1)


@pytest.mark.parametrize('verb', ['status', 'ls', 'ssh'])
def test_ctrl_c_in_verbs_that_only_look(two, verb):
  before = two.resources()
  waiting = '#!/bin/sh\necho asked >&2\nexec sleep 100\n'
  slow = two.cloud.folder / 'slow'
  slow.mkdir()
  (slow / 'gcloud').write_text(waiting)
  (slow / 'gcloud').chmod(0o755)
  name = [] if verb == 'ls' else ['exp-1']
  process = two.start(verb, *name, PATH=f'{slow}:{two.env["PATH"]}', BAM_PROJECT='proj-1')
  temporary = Path(two.env['TMPDIR'])
  wait_for(lambda: any('asked' in file.read_text() for file in temporary.glob('*/errors')))
  assert interrupt(process)[0] == 130
  assert two.resources() == before and not list(temporary.iterdir())


def test_ssh_runs_a_command_there(two):
  done = two('ssh', 'exp-1', '--worker=1', '--', 'bash', '-c', 'echo "$1"; exit 9', '-', "a  'b'")
  assert (done.returncode, done.stdout) == (9, "a  'b'\n")


def test_supervise_recreates_after_a_preemption_and_goes_on(tpu):
  program = 'echo start >>"$0"; ' + WAIT
  record = tpu.cloud.folder / 'record'
  record.touch()
  tpu.cloud.plan('zone-a', 'active', 'stock-out')
  words = ['bash', '-c', program, str(record)]
  process = tpu.start('supervise', 'exp-1', '--delete-on-exit', '--', *words)
  wait_for(lambda: started(tpu))
  tpu.cloud.preempt('zone-a', 'exp-1')
  wait_for(lambda: started(tpu, zone='zone-b'))
  for worker in range(2):
    (home(tpu, worker, zone='zone-b') / 'go').write_text('0')
  _, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 0, err
  assert record.read_text() == 'start\n' * 4 and 'restart 1 of 10' in err
  assert tpu.cloud.read()['created'] == ['zone-a/exp-1', 'zone-b/exp-1']
  assert tpu.resources() == []


@pytest.mark.slow
def test_supervise_runs_again_what_sigterm_has_stopped_on_whole_machines(two):
  once = 'if [[ -e ~/been ]]; then exit 0; fi; touch ~/been; exit 143'
  done = two('supervise', 'exp-1', '--', 'bash', '-c', once)
  assert done.returncode == 0, done.stderr
  assert two.cloud.read()['created'] == ['zone-a/exp-1']


@pytest.mark.slow
def test_supervise_has_a_budget(two):
  words = ['bash', '-c', 'exit 143']
  done = two('supervise', 'exp-1', '--retries=2', '--delete-on-exit', '--', *words)
  assert done.returncode == 143
  assert '2 restarts are used up' in done.stderr and two.resources() == []


def test_supervise_does_not_repeat_a_failure(two):
  done = two('supervise', 'exp-1', '--', 'bash', '-c', 'exit 4')
  assert done.returncode == 4 and 'restart' not in done.stderr
  assert two.resources() == ['zone-a/exp-1'] and 'costs money until' in done.stderr


@pytest.mark.slow
def test_supervise_waits_for_the_word_on_a_failure(tpu):
  """A worker may notice that its peer is gone before the service says so."""
  process = tpu.start('supervise', 'exp-1', '--settle=100', '--', 'bash', '-c', WAIT)
  wait_for(lambda: started(tpu))
  (home(tpu, 1) / 'go').write_text('134')
  for line in process.stderr:
    if 'failed with exit status 134' in line:
      break
  tpu.cloud.preempt('zone-a', 'exp-1')
  wait_for(lambda: len(tpu.cloud.read()['created']) == 2 and started(tpu))
  assert interrupt(process)[0] == 130
  assert tpu.resources() == ['zone-a/exp-1']
