"""`run`, `logs`, `status`, `ssh`, `supervise`: workers are folders, their processes are real."""

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


def begin(tpu, *words, script=WAIT):
  """Starts a subcommand with a script for its workers, and waits until they have begun."""
  process = tpu.start(*words, '--', 'bash', '-c', script)
  wait_for(lambda: started(tpu))
  return process


def go(tpu, *codes, **where):
  """Lets the workers' commands end."""
  for worker, code in enumerate(codes):
    if code is not None:
      (home(tpu, worker, **where) / 'go').write_text(str(code))


def exits(tpu):
  files = (file for w in range(2) for file in home(tpu, w).glob('.bam/run/*/exit'))
  return [int(file.read_text()) for file in files]


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
  assert two('run', 'exp-1', '--', 'true').returncode == 0
  before = git(house, 'rev-parse', 'HEAD')
  try:
    (house / 'requirements.txt').write_text('numpy\nscipy\n')
    unsent = two('run', 'exp-1', '--', 'cat', 'requirements.txt')
    assert unsent.stdout == 'numpy\n' and 'uncommitted changes are not sent' in unsent.stderr
    assert made() == [1, 1]
    git(house, 'commit', '--quiet', '--all', '--message=More')
    assert two('run', 'exp-1', '--', 'cat', 'requirements.txt').stdout == 'numpy\nscipy\n'
    assert made() == [2, 2]
    (house / 'launch' / 'requirements.txt').write_text('no-such-package\n')
    git(house, 'commit', '--quiet', '--all', '--message=Wrong')
    done = two('run', 'exp-1', '--', 'true')
    assert done.returncode == 1 and 'no-such-package was not found' in done.stderr
    assert 'the workers could not start' in done.stderr
  finally:
    git(house, 'reset', '--quiet', '--hard', before)


@pytest.mark.slow
def test_workers_of_several_slices_have_numbers_of_their_own(tpu):
  tpu('up', 'many', '--slices=2')
  done = tpu('run', 'many', '--', 'bash', '-c', 'echo $BAM_SLICE $BAM_WORKER $BAM_WORKERS')
  assert done.returncode == 0, done.stderr
  homes = [home(tpu, w, f'many-{s}') for s in range(2) for w in range(2)]
  logs = [next(folder.glob('.bam/run/*/log')).read_text() for folder in homes]
  assert logs == ['0 0 4\n', '0 1 4\n', '1 2 4\n', '1 3 4\n']


@pytest.mark.slow
def test_a_worker_that_fails_stops_the_others(two):
  """By SIGTERM, and by SIGKILL those that do not stop."""
  process = begin(two, 'run', 'exp-1', script='trap "" TERM; ' + WAIT)
  go(two, None, 3)
  _, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 3 and 'worker 0/1 failed with exit status 3' in err
  assert exits(two) == [137, 3]


@pytest.mark.slow
def test_ctrl_c_in_run_lets_the_command_save(two):
  process = begin(two, 'run', 'exp-1', script='trap "echo saved; exit 143" TERM; ' + WAIT)
  code, _, err = interrupt(process)
  assert code == 130 and exits(two) == [143, 143]
  assert 'saved' in next(home(two, 1).glob('.bam/run/*/log')).read_text()
  assert 'costs money until: launch/tpu down exp-1' in err
  assert two.resources() == ['zone-a/exp-1']


@pytest.mark.slow
def test_detach_then_status_logs_the_same_command_again_and_another(two):
  command = ['run', 'exp-1', '--', 'bash', '-c', WAIT]
  assert two('run', 'exp-1', '--detach', *command[2:]).returncode == 0
  wait_for(lambda: started(two))
  status = two('status', 'exp-1').stdout.splitlines()
  assert status[0] == 'exp-1  zone-a  v5litepod-8  ACTIVE'
  assert [line.split()[:3:2] for line in status[1:]] == [['0/0', 'running'], ['0/1', 'running']]
  other = two('run', 'exp-1', '--delete-on-exit', '--', 'true')
  assert other.returncode == 2 and 'exp-1 is running something else' in other.stderr
  assert two.resources() == ['zone-a/exp-1']
  logs, again = two.start('logs', 'exp-1', '--worker=1'), two.start(*command)
  wait_for(lambda: 'following it' in again.stderr.readline())
  go(two, 0, 0)
  assert logs.communicate(timeout=DEADLINE)[0] == 'worker 1 of 2\n' and logs.returncode == 0
  assert again.communicate(timeout=DEADLINE)[0] == 'worker 0 of 2\n' and again.returncode == 0
  assert exits(two) == [0, 0]
  for worker in range(2):
    (home(two, worker) / 'go').unlink()
  two('run', 'exp-1', '--detach', '--', 'bash', '-c', 'true; ' + WAIT)
  wait_for(lambda: two('status', 'exp-1').stdout.count('running') == 2)
  done = two('run', 'exp-1', '--replace', '--', 'echo', 'the new one')
  assert (done.returncode, done.stdout) == (0, 'the new one\n'), done.stderr
  assert sorted(exits(two)) == [0, 0, 0, 0, 143, 143]


@pytest.mark.slow
def test_ssh_runs_a_command_there_and_knows_the_workers(two):
  done = two('ssh', 'exp-1', '--worker=1', '--', 'bash', '-c', 'echo "$1"; exit 9', '-', "a  'b'")
  assert (done.returncode, done.stdout) == (9, "a  'b'\n")
  done = two('ssh', 'exp-1', '--worker=2', '--', 'true')
  assert done.returncode == 2
  assert '--worker=2: a slice of exp-1 has 2 workers, counted from 0.' in done.stderr


@pytest.mark.slow
def test_supervise_recreates_after_a_preemption_and_goes_on(tpu):
  record = tpu.cloud.folder / 'record'
  tpu.cloud.plan('zone-a', 'active', 'stock-out')
  script = f'echo start >>{record}; ' + WAIT
  process = begin(tpu, 'supervise', 'exp-1', '--delete-on-exit', script=script)
  tpu.cloud.preempt('zone-a', 'exp-1')
  wait_for(lambda: started(tpu, zone='zone-b'))
  go(tpu, 0, 0, zone='zone-b')
  _, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 0, err
  assert record.read_text() == 'start\n' * 4 and 'restart 1 of 10' in err
  assert tpu.cloud.read()['created'] == ['zone-a/exp-1', 'zone-b/exp-1']
  assert tpu.resources() == []


@pytest.mark.slow
def test_supervise_repeats_what_sigterm_has_stopped_within_a_budget_and_no_failure(two):
  run = lambda script, *flags: two('supervise', 'exp-1', *flags, '--', 'bash', '-c', script)
  done = run('exit 4')
  assert done.returncode == 4 and 'restart' not in done.stderr
  assert two.resources() == ['zone-a/exp-1'] and 'costs money until' in done.stderr
  done = run('if [[ -e ~/been ]]; then exit 0; fi; touch ~/been; exit 143')
  assert done.returncode == 0, done.stderr
  assert two.cloud.read()['created'] == ['zone-a/exp-1']
  done = run('exit 143', '--retries=2', '--delete-on-exit')
  assert done.returncode == 143
  assert '2 restarts are used up' in done.stderr and two.resources() == []


@pytest.mark.slow
def test_supervise_waits_for_the_word_on_a_failure(tpu):
  """A worker may notice that its peer is gone before the service says so."""
  process = begin(tpu, 'supervise', 'exp-1', '--settle=100', '--delete-on-exit')
  go(tpu, None, 134)
  wait_for(lambda: 'failed with exit status 134' in process.stderr.readline())
  tpu.cloud.preempt('zone-a', 'exp-1')
  wait_for(lambda: len(tpu.cloud.read()['created']) == 2 and started(tpu))
  assert interrupt(process)[0] == 130 and tpu.resources() == []
