"""One job has a run for itself, as long as its process lives."""

import functools
import os
import signal

import pytest

from bam_jax.errors import UserError
from bam_jax.files import claims

HOLD = """
import sys
from pathlib import Path
from bam_jax.files import claims
with claims.Claims(print) as held:
  held.take(map(Path, sys.argv[1:]))
  print('taken', flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def job(hold):
  """The function that starts another process, which holds some folders until it is killed."""
  return functools.partial(hold, HOLD)


def test_a_run_belongs_to_one_job_until_it_ends(job, tmp_path):
  seed, code, law = (tmp_path / name for name in ('seed', 'code', 'law'))
  other = job(seed, code)
  with claims.Claims(print) as held:
    held.take([law])  # runs that differ, in one workdir
    with pytest.raises(UserError, match=f'{code} is being trained by process {other.pid} on '):
      held.take([code])
  job(law).send_signal(signal.SIGKILL)
  other.send_signal(signal.SIGKILL)
  other.wait()
  told = []
  with claims.Claims(told.append) as held:
    held.take([seed, code])
    assert told == []
    assert str(os.getpid()) in (seed / 'lock').read_text()
  with claims.Claims(print) as held:
    held.take([seed])


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(claims.UNKNOWN[0], 'No locks available')

  monkeypatch.setattr(claims.fcntl, 'flock', refuse)
  told = []
  with claims.Claims(told.append) as held:
    held.take([tmp_path / 'seed', tmp_path / 'code'])
  (sentence,) = told
  assert str(tmp_path) in sentence and 'without locks' in sentence
