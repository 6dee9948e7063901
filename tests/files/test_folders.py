"""Folders that are complete or not there."""

import fcntl
import os
from pathlib import Path

import pytest
from etils import epath

from bam_jax.errors import UserError
from bam_jax.files import folders


def test_a_new_folder_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
  synced, rename = set(), os.rename

  def renamed(beside, path):
    inside = {found.stat().st_ino for found in (Path(beside), *Path(beside).rglob('*'))}
    assert len(inside) == 3 and inside <= synced
    rename(beside, path)

  monkeypatch.setattr(os, 'fsync', lambda file: synced.add(os.fstat(file).st_ino))
  monkeypatch.setattr(os, 'rename', renamed)
  with folders.new_folder(tmp_path / 'made') as folder:
    (folder / 'inner').mkdir()
    (folder / 'inner' / 'file').write_text('all')
  assert tmp_path.stat().st_ino in synced, 'the name itself'


@pytest.mark.parametrize('error', [ValueError('x'), KeyboardInterrupt(), UserError('x.')], ids=repr)
def test_a_new_folder_that_fails_leaves_nothing(tmp_path, error):
  with pytest.raises(type(error)):
    with folders.new_folder(tmp_path / 'made') as folder:
      (folder / 'file').write_text('half')
      raise error
  assert list(tmp_path.iterdir()) == []


def test_what_a_dead_writer_left_is_removed_and_a_live_one_is_left_alone(tmp_path):
  dead, live, other = (
    tmp_path / name for name in ('made.partial-1', 'made.partial-2', 'made2.partial-3')
  )
  for folder in (dead, live, other):
    folder.mkdir()
    (folder / 'file').write_text('half')
  lock = os.open(live, os.O_RDONLY)
  fcntl.flock(lock, fcntl.LOCK_EX)
  with folders.new_folder(tmp_path / 'made'):
    assert not dead.exists()
  os.close(lock)
  assert (live / 'file').exists() and (other / 'file').exists()
  assert (tmp_path / 'made').is_dir()


def test_a_folder_that_cannot_be_made(tmp_path):
  there, link, file = (tmp_path / name for name in ('there', 'link', 'file'))
  there.mkdir()
  link.symlink_to(tmp_path / 'nowhere')
  file.touch()
  before = sorted(tmp_path.rglob('*'))
  for path, words in (
    (there, 'exists'),
    (link, 'exists'),
    (file / 'made', 'is a file'),
    (epath.Path('/proc/made'), 'cannot be written'),  # root may write anywhere else
  ):
    with pytest.raises(UserError, match=f'{path}.* {words}'), folders.new_folder(path):
      raise AssertionError('it must not begin')
  with pytest.raises(UserError, match='GB free'), folders.new_folder(tmp_path / 'made', 2**60):
    raise AssertionError('it must not begin')
  assert sorted(tmp_path.rglob('*')) == before
