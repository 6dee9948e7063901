"""The display on a terminal and in a log, with a clock that the test turns."""

import io

import pytest
from rich.console import Console

from bam_jax.train.progress import Progress, duration


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def display(terminal, runs=None, enabled=True):
  clock, out = Clock(), io.StringIO()
  console = Console(file=out, force_terminal=terminal, width=100, color_system=None, height=40)
  runs = {'seed': 100, 'code': 50, 'bam_kv': 60} if runs is None else runs
  return Progress(runs, enabled, console, clock), clock, out


def test_a_log_gets_plain_lines_and_few_of_them():
  progress, clock, out = display(terminal=False)
  with progress:
    progress.skip('seed')
    progress.start('code', 10)
    for step in range(11, 51):
      clock.now += 1.0
      progress.update('code', step, 5.0 - step / 50, 1234.5, 0.9)
    progress.note('[saved] a checkpoint')
    progress.finish('code', 4.0)
  assert out.getvalue().splitlines() == [
    'seed: skipped, it is finished',
    'code: resumes at step 10 of 50',
    'code: step 20 of 50, loss 4.6000, 1,234 tokens/s, goodput 90%, 30s left',
    'code: step 30 of 50, loss 4.4000, 1,234 tokens/s, goodput 90%, 20s left',
    'code: step 40 of 50, loss 4.2000, 1,234 tokens/s, goodput 90%, 10s left',
    'code: step 50 of 50, loss 4.0000, 1,234 tokens/s, goodput 90%, 0s left',
    '[saved] a checkpoint',
    'code: done, loss 4.0000, 40s; about 1m 00s left for the recipe',
  ]


def test_a_run_that_resumes_at_its_end_has_no_loss():
  progress, _, out = display(terminal=False)
  with progress:
    progress.start('code', 50)
    progress.finish('code', None)
  assert 'code: done, 0s' in out.getvalue().splitlines()[1]


def test_the_first_step_is_compiling_and_does_not_count():
  progress, clock, out = display(terminal=False)
  with progress:
    progress.start('seed', 0)
    clock.now = 60.0
    progress.update('seed', 1, 9.0, 10.0, 0.5)
    clock.now = 70.0
    progress.update('seed', 11, 8.0, 10.0, 0.5)
  lines = out.getvalue().splitlines()
  assert lines[0] == 'seed: starts, 100 steps'
  assert lines[1].endswith('10 tokens/s, goodput 50%')
  assert lines[2].endswith('1m 29s left')
  assert lines[3] == 'seed: stopped at step 11 of 100'


def test_a_terminal_shows_the_runs():
  progress, clock, out = display(terminal=True)
  with progress:
    progress.skip('seed')
    progress.start('code', 0)
    for step in (1, 26):
      clock.now += 25.0
      progress.update('code', step, 3.25, 2000.0, 0.5)
    progress.note('above the table')
    progress._live.refresh()
  text = out.getvalue()
  assert 'above the table' in text
  last = text[text.rindex('run ') :]
  for words in ('seed', 'skipped', 'code', 'stopped', '26/50', '3.2500', '2,000', 'waiting'):
    assert words in last
  assert '1 of 3 runs finished' in last
  assert 'about 1m 24s left' in text
  assert '24s' in text


def test_an_error_leaves_the_table_and_passes_on():
  progress, _, out = display(terminal=True)
  with pytest.raises(KeyError), progress:
    progress.start('seed', 0)
    raise KeyError('x')
  assert 'stopped' in out.getvalue()


@pytest.mark.parametrize('terminal', [True, False])
def test_disabled_writes_nothing(terminal):
  progress, _, out = display(terminal, enabled=False)
  with progress:
    progress.skip('seed')
    progress.start('code', 0)
    progress.update('code', 1, 1.0, 1.0, 1.0)
    progress.note('hello')
    progress.finish('code', 1.0)
  assert out.getvalue() == ''


def test_no_runs():
  progress, _, out = display(terminal=True, runs={})
  with progress:
    pass
  assert '0 of 0 runs finished' in out.getvalue()


@pytest.mark.parametrize(
  'seconds, text',
  [
    (0, '0s'),
    (59.4, '59s'),
    (59.6, '1m 00s'),
    (185, '3m 05s'),
    (3720, '1h 02m'),
    (90000, '25h 00m'),
  ],
)
def test_duration(seconds, text):
  assert duration(seconds) == text
