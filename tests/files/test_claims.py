"""Locks of runs, where there are none; that a lock keeps others out is in faults/test_runs.py."""

from bam_jax.files import claims


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(claims.UNKNOWN[0], 'No locks available')

  monkeypatch.setattr(claims.fcntl, 'flock', refuse)
  told = []
  with claims.Claims(told.append) as held:
    held.take([tmp_path / 'seed', tmp_path / 'code'])
  (sentence,) = told
  assert str(tmp_path) in sentence and 'without locks' in sentence
