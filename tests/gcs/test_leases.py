"""A run of a bucket belongs to one job until that has ended, or was lost."""

import os
import signal

import pytest

from bam_jax.errors import UserError
from bam_jax.files import claims

pytestmark = pytest.mark.slow
HOLD = """
import sys
from etils import epath
from bam_jax.files import claims
claims.BEAT_SECONDS, claims.LEASE_SECONDS, claims.POLL_SECONDS = map(float, sys.argv[1:4])
with claims.Claims(lambda sentence: print('told', sentence, flush=True)) as held:
  held.take(map(epath.Path, sys.argv[4:]))
  print('taken', flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def quick(monkeypatch):
  """A lease that is lost after three seconds."""
  for name, seconds in (('BEAT', 0.2), ('LEASE', 3.0), ('POLL', 0.05)):
    monkeypatch.setattr(claims, f'{name}_SECONDS', seconds)


@pytest.fixture
def job(hold):
  """The function that starts another process, which holds folders until it ends or is killed."""
  return lambda *folders, beat=0.2: hold(HOLD, beat, 3, 0.05, *folders)


def test_who_lives_is_not_replaced_and_who_ends_gives_back(folder, job):
  seed, code, law = (folder / name for name in ('seed', 'code', 'law'))
  other, told = job(seed, code), []
  with claims.Claims(told.append) as held:
    held.take([law])  # runs that differ, in one workdir
    with pytest.raises(UserError, match=f'{code} is being trained by process {other.pid} on '):
      held.take([code])
    assert 'waiting up to 60 s' in told[0] and str(code) in told[0]
    other.communicate('')
    held.take([seed, code])
    assert f'process {os.getpid()} on ' in (seed / claims.NAME).read_text()
  assert not any((path / claims.NAME).exists() for path in (seed, code, law))


def test_who_is_lost_is_replaced_when_it_stays_silent(folder, job, quick):
  other, told = job(folder / 'seed'), []
  other.send_signal(signal.SIGKILL)
  other.wait()
  with claims.Claims(told.append) as held:
    held.take([folder / 'seed'])
    assert f'process {os.getpid()} on ' in (folder / 'seed' / claims.NAME).read_text()
  assert f'was being trained by process {other.pid} on ' in told[0]


def test_who_was_cut_off_ends_when_it_finds_itself_replaced(folder, job, quick):
  other = job(folder / 'seed')
  other.send_signal(signal.SIGSTOP)
  with claims.Claims(lambda sentence: None) as held:
    held.take([folder / 'seed'])
    other.send_signal(signal.SIGCONT)
    assert other.wait(timeout=60) == claims.LOST
    said = other.stderr.read()
    assert f'was taken over by process {os.getpid()} on ' in said
    assert f'process {os.getpid()} on ' in (folder / 'seed' / claims.NAME).read_text()
