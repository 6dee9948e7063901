"""A run's seconds by kind, over its attempts."""

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
