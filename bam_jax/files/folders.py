"""New folders and files, complete or absent; paths that may be in a bucket."""

import contextlib
import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import tempfile
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from bam_jax.config.strict import require
from bam_jax.errors import UserError

BESIDE = '.partial-'  # in the name of a folder that is being written
CLIENTS = ('aiohttp', 'gcsfs', 'google')  # of buckets, whose errors have no common base class
UNSYNCED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # of file systems without fsync
FILES_AT_ONCE = 8  # sent to a bucket, each of which takes up to 100 MB of memory
COMMITTED = 'commit_success.txt'  # Orbax writes it last to items in a bucket


def in_bucket(path: epath.PathLike) -> bool:
  """Whether a path is in Google Cloud Storage."""
  return os.fspath(path).startswith('gs://')


def at(path: epath.PathLike) -> Path | epath.Path:
  """The path object for a path, which supports the methods of Path in a bucket too."""
  return epath.Path(path) if in_bucket(path) else Path(path)


def absolute(path: epath.PathLike) -> Path | epath.Path:
  """The same path, independent of the working directory."""
  return at(path) if in_bucket(path) else at(path).absolute()


def reach(path: epath.PathLike) -> epath.Path:
  """A path that may be in a bucket; UserError if this machine cannot access it."""
  path = epath.Path(path)
  if in_bucket(path):
    try:
      import fsspec  # only buckets need it

      # Cached listings may be stale: other jobs write, and arrays are written by TensorStore.
      fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
      path.exists()
    except ImportError:
      raise UserError(f'{path} is in a bucket, which requires gcsfs: pip install gcsfs.') from None
    except Exception as error:  # of many types: credentials, names, networks
      raise UserError(f'{path} cannot be reached: {first_line(error)}.') from error
  return path


def check_bucket(path: epath.PathLike) -> None:
  """UserError if the path is in a bucket that cannot be accessed."""
  if in_bucket(path):
    bucket = epath.Path(*reach(path).parts[:3])
    wrong = f'{bucket} cannot be accessed: check its name, and grant this account'
    roles = 'roles/storage.objectUser and roles/storage.legacyBucketReader'
    require(bucket.exists(), f'{wrong} {roles} on it.')


def is_complete(item: epath.Path) -> bool:
  """Whether Orbax finished a checkpoint's item: it renames the folder, or marks it in a bucket."""
  return (item / COMMITTED).exists() if in_bucket(item) else item.is_dir()


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
  """Turns errors of the system or the bucket during a write into UserErrors naming `path`."""
  try:
    yield
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}.') from error
  except Exception as error:
    if not in_bucket(path) or type(error).__module__.split('.')[0] not in CLIENTS:
      raise
    raise UserError(f'{path} cannot be written: {first_line(error)}.') from error


def url(folder: epath.PathLike) -> str:
  """A folder as tensorstore names it."""
  path = f'{folder}/' if in_bucket(folder) else f'file://{os.path.realpath(folder)}/'
  return urllib.parse.quote(path, safe=':/')


def reason(error: Exception) -> str:
  """The cause in an error of tensorstore or of the system, in a few words."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  system = re.search(r"os_error_code='(\d+)'", str(error))
  return os.strerror(int(system[1])) if system else str(error).split(' [')[0].strip()


def first_line(error: BaseException) -> str:
  """An error's message in one line, without a full stop."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip('.')


def write_file(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file atomically, also with concurrent writers; UserError if that fails."""
  content = content.encode() if isinstance(content, str) else content
  with writing(path):
    if in_bucket(path):
      at(path).write_bytes(content)  # an object appears only when it is complete
      return
    beside = Path(f'{path}{BESIDE}{secrets.token_hex(4)}')
    try:
      beside.write_bytes(content)
      _sync(beside)
      beside.replace(path)
    finally:
      beside.unlink(missing_ok=True)


def sync(folder: epath.PathLike) -> None:
  """Returns when all contents of a folder on a disk would survive a power failure."""
  for parent, _, names in os.walk(folder):
    for name in (*names, ''):
      _sync(os.path.join(parent, name))


def _sync(path: epath.PathLike) -> None:
  """Returns when a file is on disk, as far as its file system can guarantee it."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in UNSYNCED:
      raise
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def new_folder(path: epath.PathLike, nbytes: int = 0) -> Iterator[epath.Path]:
  """A folder to write into that becomes `path` when the block ends, complete and on disk.

  Until then it is beside `path` under another name, and it is removed if the block raises. What
  killed processes left is removed too. gs:// has no rename: the block writes into `path` itself,
  `meta` last, without which a folder is not a checkpoint. UserError if `path` exists, cannot be
  written, or its disk has no room for `nbytes`.
  """
  path, remote = reach(path), in_bucket(path)
  exists = path.exists() or (not remote and os.path.lexists(path))
  require(not exists, f'{path} exists: choose another folder, or delete it.')
  with contextlib.ExitStack() as stack, writing(path):
    beside = path if remote else stack.enter_context(_beside(path, nbytes))
    try:
      yield beside
      if not remote:
        sync(beside)
        os.rename(beside, path)
        _sync(path.parent)
    except BaseException:
      beside.rmtree(missing_ok=True) if remote else shutil.rmtree(beside, ignore_errors=True)
      raise


@contextlib.contextmanager
def _beside(path: epath.Path, nbytes: int) -> Iterator[epath.Path]:
  """A new folder beside `path`, whose lock shows that its writer is alive."""
  require(not path.parent.is_file(), f'{path} cannot be written: {path.parent} is a file.')
  os.makedirs(path.parent, exist_ok=True)
  for left in path.parent.glob(glob.escape(path.name + BESIDE) + '*'):
    with locked(left) as dead:
      if dead:
        shutil.rmtree(left, ignore_errors=True)
  free = shutil.disk_usage(path.parent).free
  wrong = f'{path} needs {nbytes / 1e9:.3g} GB, but its disk has {free / 1e9:.3g} GB free'
  require(free >= nbytes, f'{wrong}: make room.')
  name = f'{path.name}{BESIDE}{os.getpid()}-{secrets.token_hex(4)}'
  beside = absolute(path).with_name(name)  # as Orbax wants it
  os.mkdir(beside)
  with locked(beside):
    yield beside


@contextlib.contextmanager
def locked(folder: epath.PathLike) -> Iterator[bool]:
  """Locks a folder on a disk until the block or the process ends; yields False if it cannot."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      free = True
    except OSError:
      free = False
    yield free
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def drafts(target: epath.PathLike) -> Iterator[Path]:
  """A folder to write into; when the block ends, its files appear in `target`, each complete.

  It is for libraries that only support files: objects in a bucket can neither grow nor be
  memory-mapped. On a disk it is inside `target`: if the disk has room for all files, they all
  appear.
  """
  remote = in_bucket(target)
  if not remote:
    Path(target).mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=BESIDE, dir=None if remote else target) as beside:
    yield Path(beside)
    files = [path for path in sorted(Path(beside).rglob('*')) if path.is_file()]
    names = [str(path.relative_to(beside)) for path in files]
    if remote:
      send(Path(beside), epath.Path(target), names)
      return
    for path, name in zip(files, names):
      Path(target, name).parent.mkdir(parents=True, exist_ok=True)
      path.replace(Path(target, name))


def send(folder: Path, target: epath.Path, names: Sequence[str]) -> None:
  """Uploads files of a folder to one in a bucket; UserError if the bucket rejects them."""
  import fsspec  # comes with gcsfs, which only buckets need

  with writing(target):
    local, remote = ([str(root / name) for name in names] for root in (folder, target))
    fsspec.filesystem('gcs').put(local, remote, batch_size=FILES_AT_ONCE)
