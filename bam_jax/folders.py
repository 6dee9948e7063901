"""New folders and files, complete or not there; paths that may lie in a bucket."""

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
import weakref
from collections.abc import Iterator
from typing import Protocol

from etils import epath

from bam_jax.errors import UserError

BESIDE = '.partial-'  # in the name of a folder that is being written


class Settles(Protocol):
  """What may write when its caller no longer waits for it."""

  def settle(self) -> None:
    """Waits until nothing is under way, whatever became of it."""


_writers: weakref.WeakSet[Settles] = weakref.WeakSet()


def watch(writer: Settles) -> None:
  """Lets `new_folder` wait for a writer before it removes what the writer writes into."""
  _writers.add(writer)


def in_bucket(path: epath.PathLike) -> bool:
  """Whether a path is one of Google Cloud Storage."""
  return os.fspath(path).startswith('gs://')


def reach(path: epath.PathLike) -> epath.Path:
  """A path that may be in a bucket; UserError when a package that this takes is missing."""
  path = epath.Path(path)
  if in_bucket(path):
    try:
      path.exists()
    except ImportError:
      raise UserError(f'{path} is in a bucket, which takes a package: pip install gcsfs.') from None
  return path


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
  """Makes of what the system says against a write a UserError that names `path`."""
  try:
    yield
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}.') from error


def write_file(path: epath.PathLike, text: str) -> None:
  """Writes a file that is whole at every moment, whoever else writes it too; else UserError."""
  beside = f'{os.fspath(path)}{BESIDE}{secrets.token_hex(4)}'
  with writing(path):
    try:
      with open(beside, 'w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
      os.replace(beside, path)
    except BaseException:
      with contextlib.suppress(OSError):
        os.unlink(beside)
      raise


@contextlib.contextmanager
def new_folder(path: epath.PathLike, nbytes: int = 0) -> Iterator[epath.Path]:
  """A folder to write into that becomes `path` when the block ends, complete and on disk.

  Until then it lies beside `path` under another name, and it is removed when the block raises.
  What a killed process left there is removed too. On gs:// nothing can be renamed: the block writes
  into `path` itself, and `meta` last, without which a folder is no checkpoint.

  Args:
    path: what to make; its parents are made too.
    nbytes: how much will be written; a disk with less room is refused at once.

  Raises:
    UserError: `path` exists, or the system refuses something.
  """
  path = reach(path)
  remote = in_bucket(path)
  if path.exists() or (not remote and os.path.lexists(path)):
    raise UserError(f'{path} exists: choose another folder, or delete it.')
  beside, lock = (path, None) if remote else _begin(path, nbytes)
  try:
    yield beside
    if not remote:
      _sync(beside)
      os.rename(beside, path)
      _sync_one(path.parent)
  except BaseException as error:
    for writer in list(_writers):  # what is still being written would bring the folder back
      writer.settle()
    shutil.rmtree(beside, ignore_errors=True) if not remote else beside.rmtree(missing_ok=True)
    if isinstance(error, OSError):
      raise UserError(f'{path} cannot be written: {error.strerror or error}.') from error
    raise
  finally:
    if lock is not None:
      os.close(lock)


def _begin(path: epath.Path, nbytes: int) -> tuple[epath.Path, int]:
  """A new folder beside `path`, and the lock that says that its writer lives."""
  beside = path.with_name(f'{path.name}{BESIDE}{os.getpid()}-{secrets.token_hex(4)}')
  try:
    if path.parent.is_file():
      raise UserError(f'{path} cannot be written: {path.parent} is a file.')
    os.makedirs(path.parent, exist_ok=True)
    for left in path.parent.glob(glob.escape(path.name + BESIDE) + '*'):
      if (lock := _lock(left)) is not None:
        shutil.rmtree(left, ignore_errors=True)
        os.close(lock)
    free = shutil.disk_usage(path.parent).free
    if free < nbytes:
      raise UserError(
        f'{path} needs {nbytes / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB free: make room.'
      )
    os.mkdir(beside)
    return beside, _lock(beside)
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}.') from error


def _lock(folder: epath.Path) -> int | None:
  """Locks a folder until the descriptor is closed or the process ends; None if another has it."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    os.close(descriptor)
    return None
  return descriptor


def _sync(folder: epath.Path) -> None:
  """Returns when all that is in a folder is on disk."""
  for parent, _, names in os.walk(folder):
    for name in names:
      _sync_one(os.path.join(parent, name))
    _sync_one(parent)


def _sync_one(path: epath.PathLike) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
