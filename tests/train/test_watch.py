"""A stalled step is told once, with what it waits for."""

import time

import pytest

from bam_jax.train import goodput, watch


@pytest.fixture
def told():
  return []


def wait_for(told: list, count: int) -> None:
  deadline = time.monotonic() + 30
  while len(told) < count:
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_a_stall_is_told_once_and_its_end_too(told):
  with watch.Watch('seed', 6, 0.3, lambda: 'data', told.append) as looking:
    looking.done(7)
    wait_for(told, 1)
    time.sleep(0.4)
    looking.done(8)
    wait_for(told, 2)
    looking.done(9)
  assert 'seed: stalled' in told[0] and 'after step 7' in told[0]
  assert 'it waits for a batch of data' in told[0]
  assert told[1].startswith('seed: goes on, step 8 took')
  assert len(told) == 2


def test_what_goes_on_between_two_steps_is_no_stall(told):
  """Held-out batches: of them too, one that does not finish is told."""
  with watch.Watch('seed', 6, 1.0, lambda: 'evaluate', told.append) as looking:
    for _ in range(15):
      time.sleep(0.1)
      looking.goes_on()
    assert told == []
    wait_for(told, 1)
    looking.goes_on()
    looking.goes_on()
    assert told[1:] == ['seed: goes on']
  assert 'after step 6; it waits for the held-out losses' in told[0]


def test_slow_steps_are_no_stall(told):
  """Ten times as long as usual, at least: what is usual is the run's own."""
  with watch.Watch('seed', 0, 0.05, lambda: 'step', told.append) as looking:
    looking._took.extend([1.0] * 5)  # seconds that no test should wait for
    looking.done(1)
    time.sleep(0.3)
  assert told == []


def test_nothing_watches_when_nobody_asks(told):
  with watch.Watch('seed', 0, 0.0, lambda: 'step', told.append) as looking:
    looking.done(1)
    assert not looking._thread.is_alive()
  assert told == []


@pytest.mark.parametrize('seconds', [1e-30, 1e30])
def test_any_time_can_be_waited_for(told, seconds):
  with watch.Watch('seed', 0, seconds, lambda: 'step', told.append) as looking:
    time.sleep(0.1)
    assert looking._thread.is_alive()
  assert len(told) == (seconds < 1)


def test_there_is_a_word_for_whatever_a_run_may_wait_for():
  assert watch.WAITS.keys() == set(goodput.KINDS)
