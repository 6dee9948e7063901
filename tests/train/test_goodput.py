"""A run's seconds by kind, over its attempts."""

import subprocess
import sys
import time

import pytest

from bam_jax.train import goodput


class Clock:
  now = 100.0

  def __call__(self) -> float:
    return self.now


def test_every_second_is_of_one_kind():
  clock = Clock()
  spent = goodput.Goodput(90.0, clock)
  clock.now += 5
  with spent.spend('step'):
    clock.now += 60
    with spent.spend('data'):
      assert spent.kind == 'data'
      clock.now += 10
    with pytest.raises(KeyError), spent.spend('checkpoint'):
      clock.now += 15
      raise KeyError
    assert spent.kind == 'step'
    clock.now += 20
    wanted = {'restart': 15, 'step': 80, 'data': 10, 'checkpoint': 15, 'compile': 0, 'evaluate': 0}
    assert spent.spent() == wanted
    assert spent.seconds == 120 and spent.shares()['step'] == pytest.approx(80 / 120)


def test_attempts_add_up_and_lost_steps_are_restart():
  clock = Clock()
  spent = goodput.Goodput(98.0, clock)
  # Saved at 50 s; the last line that the attempt wrote after that was at 57.5 s.
  dropped = [{'step': 8, 'seconds': 55.0}, {'step': 9, 'seconds': 57.5}, {'step': 9, 'valid': {}}]
  spent.resume({'step': 40.0, 'compile': 10.0}, dropped)
  with spent.spend('compile'):
    clock.now += 3
  assert spent.attempt == (5.0, 3.0), 'of this attempt alone'
  assert spent.spent()['restart'] == 2 + 7.5
  assert spent.spent()['compile'] == 13
  assert spent.seconds == 5 + 57.5


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='asks /proc')
def test_a_process_began_when_it_was_started():
  code = 'import time; time.sleep(0.5)\nfrom bam_jax.train import goodput\n'
  code += 'print(time.monotonic() - goodput.process_began())'
  before = time.monotonic()
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  took = time.monotonic() - before
  assert 0.5 <= float(done.stdout) <= took + 0.02  # which the system counts in hundredths
