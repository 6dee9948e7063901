"""A run's seconds by kind, over its attempts; a stalled step is reported once."""

import time
import types

import pytest

from bam_jax.train import timing


def test_every_second_is_of_one_kind():
  clock = types.SimpleNamespace(now=105.0)
  goodput = timing.Goodput(90.0, lambda: clock.now)
  with goodput.spend('step'):
    clock.now += 60
    with goodput.spend('data'):
      assert goodput.kind == 'data'
      clock.now += 10
    with pytest.raises(KeyError), goodput.spend('checkpoint'):
      clock.now += 15
      raise KeyError
    assert goodput.kind == 'step'
    clock.now += 20
    wanted = {'restart': 15, 'step': 80, 'data': 10, 'checkpoint': 15, 'compile': 0, 'evaluate': 0}
    assert goodput.spent() == wanted
    facts = goodput.facts()
  assert facts['seconds'] == 120 and facts['goodput'] == facts['time']['step']
  assert facts['time']['step'] == pytest.approx(80 / 120)


def test_attempts_add_up_and_lost_steps_are_restart():
  clock = types.SimpleNamespace(now=100.0)
  goodput = timing.Goodput(98.0, lambda: clock.now)
  # Saved at 50 s; the last line that the attempt wrote after that was at 57.5 s.
  dropped = [{'step': 8, 'seconds': 55.0}, {'step': 9, 'seconds': 57.5}, {'step': 9, 'valid': {}}]
  goodput.resume({'step': 40.0, 'compile': 10.0}, dropped)
  with goodput.spend('compile'):
    clock.now += 3
  assert goodput.attempt() == (5.0, 3.0), 'of this attempt alone'
  assert goodput.spent()['restart'] == 2 + 7.5 and goodput.spent()['compile'] == 13
  assert goodput.facts()['seconds'] == 5 + 57.5


@pytest.fixture
def told():
  return []


@pytest.fixture
def watch(told):
  """The function (first step, seconds) -> stall watch of a run that waits for data."""
  goodput = timing.Goodput(time.monotonic())
  goodput.kind = 'data'
  return lambda step, seconds: timing.StallWatch('seed', step, seconds, goodput, told.append)


def test_a_stall_is_reported_once(watch, told):
  with watch(6, 0.3) as stalls:
    stalls(7)
    time.sleep(1.0)
    stalls(8)
    stalls(9)
  (line,) = told
  assert 'seed: stalled' in line and 'after step 7; it is waiting for a batch of data' in line


def test_what_happens_between_two_steps_is_no_stall(watch, told):
  """Held-out batches; one of them that does not finish is reported as well."""
  with watch(6, 1.0) as stalls:
    for _ in range(12):
      time.sleep(0.1)
      stalls.alive()
    assert told == []
    time.sleep(1.5)
    assert len(told) == 1


def test_slow_steps_are_no_stall(watch, told):
  """A stall is ten times as long as usual, at least: what is usual is the run's own."""
  with watch(0, 0.05) as stalls:
    stalls._took.extend([1.0] * 5)  # seconds that no test should wait for
    stalls(1)
    time.sleep(0.3)
  assert told == []
