"""How a job ends: asked to, or by the loss of a process."""

import signal

import pytest

from tests.distributed.jobs import MESH, assert_same_bits, job

STEPS = 40  # more than pass between a test's look and its signal


@pytest.fixture(scope='module')
def undisturbed(text, tmp_path_factory):
  """The workdir of one process, whose bits are those of two, to which nothing happened."""
  workdir = tmp_path_factory.mktemp('undisturbed')
  with job(workdir, text, 1, MESH, '--runs=seed', steps=STEPS) as one:
    one.succeeds()
  return workdir


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_one_step(text, undisturbed, tmp_path):
  """The checkpoint that both write is one, and the same command goes on to the same end."""
  with job(tmp_path, text, 2, MESH, '--runs=seed', steps=STEPS) as both:
    both.wait_for_step(tmp_path / 'seed', 2)
    both.processes[1].send_signal(signal.SIGTERM)
    ends = both.ends()
  assert [status for status, _ in ends] == [143, 143], ends
  assert 'Stopped by SIGTERM; the same command resumes' in ends[0][1]
  assert ends[1][1] == ''
  with job(tmp_path, text, 2, MESH, '--runs=seed', steps=STEPS) as again:
    assert 'seed: resumes at step' in again.succeeds()[0]
  assert_same_bits(tmp_path / 'seed', undisturbed / 'seed')


@pytest.mark.slow
@pytest.mark.parametrize('victim', (0, 1))
def test_a_killed_process_takes_the_other_down(text, undisturbed, tmp_path, victim):
  """Without a hang, with a sentence, and nothing is lost but the steps since the checkpoint."""
  with job(tmp_path, text, 2, MESH, '--runs=seed', '--lost_timeout=10', steps=STEPS) as both:
    both.wait_for_checkpoint(tmp_path / 'seed')
    both.processes[victim].kill()
    status, told = both.ends()[1 - victim]
  assert status not in (0, 2)
  assert 'Traceback' not in told
  assert not (tmp_path / 'seed' / 'result.json').exists()
  with job(tmp_path, text, 2, MESH, '--runs=seed', steps=STEPS) as again:
    assert 'seed: resumes at step' in again.succeeds()[0]
  assert_same_bits(tmp_path / 'seed', undisturbed / 'seed')


@pytest.mark.slow
@pytest.mark.parametrize('victim', (0, 1))
def test_a_process_that_hangs_is_lost_too(text, tmp_path, victim):
  """Stopped, it closes no connection: JAX's heartbeats notice."""
  with job(tmp_path, text, 2, MESH, '--runs=seed', '--lost_timeout=10', steps=STEPS) as both:
    both.wait_for_step(tmp_path / 'seed', 2)
    both.processes[victim].send_signal(signal.SIGSTOP)
    other = both.processes[1 - victim]
    _, told = other.communicate(timeout=60)
  assert other.returncode not in (0, 2)
  assert 'Traceback' not in told
