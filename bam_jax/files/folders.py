"""New folders and files, complete or not there; paths that may lie in a bucket."""

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from bam_jax.errors import UserError

BESIDE = '.partial-'  # in the name of a folder that is being written
CLIENTS = ('aiohttp', 'gcsfs', 'google')  # of buckets: what they raise has nothing else in common
UNSYNCED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # of file systems without fsync
COMMITTED = 'commit_success.txt'  # Orbax writes it last into what it puts into a bucket


def in_bucket(path: epath.PathLike) -> bool:
  """Whether a path is in Google Cloud Storage."""
  return os.fspath(path).startswith('gs://')


def at(path: epath.PathLike) -> Path | epath.Path:
  """The path object for a path: what it has in common with Path works in a bucket too."""
  return epath.Path(path) if in_bucket(path) else Path(path)


def absolute(path: epath.PathLike) -> Path | epath.Path:
  """The same path, whatever the working directory."""
  return at(path) if in_bucket(path) else at(path).absolute()


def reach(path: epath.PathLike) -> epath.Path:
  """A path that may be in a bucket; UserError when this machine cannot get there."""
  path = epath.Path(path)
  if in_bucket(path):
    try:
      import fsspec  # only buckets need it

      # A listing may be out of date at once: others write, and arrays are written another way.
      fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
      path.exists()
    except ImportError:
      raise UserError(f'{path} is in a bucket, which requires gcsfs: pip install gcsfs.') from None
    except Exception as error:  # of no one kind: credentials, names, networks
      raise UserError(f'{path} cannot be reached: {first_line(error)}.') from error
  return path


def check_bucket(path: epath.PathLike) -> None:
  """UserError when the bucket of a path, if it is in one, is not there."""
  if in_bucket(path):
    bucket = epath.Path(*reach(path).parts[:3])
    if not bucket.exists():
      raise UserError(
        f'{bucket} cannot be accessed: check its name, and grant this account '
        'roles/storage.objectUser and roles/storage.legacyBucketReader on it.'
      )


def is_complete(item: epath.Path) -> bool:
  """Whether Orbax finished a checkpoint's item: it renames the folder, or marks it in a bucket."""
  return (item / COMMITTED).exists() if in_bucket(item) else item.is_dir()


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
  """Turns what the system or the bucket says against a write into a UserError naming `path`."""
  try:
    yield
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}.') from error
  except Exception as error:
    if not in_bucket(path) or type(error).__module__.split('.')[0] not in CLIENTS:
      raise
    raise UserError(f'{path} cannot be written: {first_line(error)}.') from error


def first_line(error: BaseException) -> str:
  """What an error says, in one line without a full stop."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip('.')


def write_file(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file that is whole at every moment, whoever else writes it too; else UserError."""
  content = content.encode() if isinstance(content, str) else content
  with writing(path):
    if in_bucket(path):
      at(path).write_bytes(content)  # an object appears when all of it has come
      return
    beside = Path(f'{path}{BESIDE}{secrets.token_hex(4)}')
    try:
      with beside.open('wb') as file:
        file.write(content)
        file.flush()
        fsync(file.fileno())
      beside.replace(path)
    finally:
      beside.unlink(missing_ok=True)


def fsync(descriptor: int) -> None:
  """Returns when a file is on disk, as far as its file system can say so."""
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in UNSYNCED:
      raise


def sync(folder: epath.PathLike) -> None:
  """Returns when all that is in a folder, on a disk, would outlive a power cut."""
  for parent, _, names in os.walk(folder):
    for name in (*names, ''):
      _sync_path(os.path.join(parent, name))


def _sync_path(path: epath.PathLike) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  fsync(descriptor)
  os.close(descriptor)


def remove(folder: epath.PathLike) -> None:
  """Removes a folder with all that is in it, if it is there."""
  epath.Path(folder).rmtree(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: epath.PathLike, nbytes: int = 0) -> Iterator[epath.Path]:
  """A folder to write into that becomes `path` when the block ends, complete and on disk.

  Until then it lies beside `path` under another name, and it is removed when the block raises.
  What a killed process left there is removed too. On gs:// nothing can be renamed: the block writes
  into `path` itself, and `meta` last, without which a folder is not a checkpoint. UserError when
  `path` exists, cannot be written, or its disk has no room for `nbytes`.
  """
  path = reach(path)
  remote = in_bucket(path)
  if path.exists() or (not remote and os.path.lexists(path)):
    raise UserError(f'{path} exists: choose another folder, or delete it.')
  beside, lock = (path, None) if remote else _begin(path, nbytes)
  try:
    with writing(path):
      yield beside
      if not remote:
        sync(beside)
        os.rename(beside, path)
        _sync_path(path.parent)
  except BaseException:
    remove(beside) if remote else shutil.rmtree(beside, ignore_errors=True)
    raise
  finally:
    if lock is not None:
      os.close(lock)


def _begin(path: epath.Path, nbytes: int) -> tuple[epath.Path, int]:
  """A new folder beside `path`, and the lock that says that its writer lives."""
  beside = path.with_name(f'{path.name}{BESIDE}{os.getpid()}-{secrets.token_hex(4)}')
  if path.parent.is_file():
    raise UserError(f'{path} cannot be written: {path.parent} is a file.')
  with writing(path):
    os.makedirs(path.parent, exist_ok=True)
    for left in path.parent.glob(glob.escape(path.name + BESIDE) + '*'):
      if (lock := _lock(left)) is not None:
        shutil.rmtree(left, ignore_errors=True)
        os.close(lock)
    free = shutil.disk_usage(path.parent).free
    if free < nbytes:
      raise UserError(
        f'{path} needs {nbytes / 1e9:.3g} GB, but its disk has {free / 1e9:.3g} GB free: make room.'
      )
    os.mkdir(beside)
    return beside, _lock(beside)


def _lock(folder: epath.Path) -> int | None:
  """Locks a folder until the descriptor is closed or the process ends; None if another has it."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    os.close(descriptor)
    return None
  return descriptor
