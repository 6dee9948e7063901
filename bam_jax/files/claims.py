"""One job trains a run: a lock in its folder, held by the job's first process until it ends.

The system takes the lock back from a process that is killed. It holds between the hosts of a
network file system that passes locks on, as NFS does; where one knows no locks at all, as under
some FUSE mounts of buckets, `Claims` says so and nothing is locked. In a bucket itself the lock is
a lease.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Self

from etils import epath

from bam_jax.errors import UserError
from bam_jax.files import folders, leases

NAME = 'lock'
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a system without locks says


class Claims:
  """The runs' folders that this job has for itself; a context manager, which gives them back.

  Args:
    tell: is told a sentence of a lock that cannot be had, or takes time.
    look: is called again and again while it takes time; what it raises ends the wait.
  """

  def __init__(self, tell: Callable[[str], None], look: Callable[[], None] = lambda: None):
    self._held, self._tell, self._look = contextlib.ExitStack(), tell, look

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error) -> None:
    self._held.close()

  def take(self, runs: Iterable[Path | epath.Path]) -> None:
    """Claims folders, making those that are not there; in a job, only its first process does.

    Raises:
      UserError: another job has one, or one cannot be written.
    """
    runs = list(runs)
    leased = [folder for folder in runs if folders.in_bucket(folder)]
    if leased:
      with concurrent.futures.ThreadPoolExecutor(len(leased)) as pool:
        list(pool.map(self._lease, leased))
    unknown = {folder.parent for folder in runs if folder not in leased and not self._lock(folder)}
    for workdir in unknown:
      self._tell(
        f'{workdir} is on a file system without locks: see to it that no other job trains the same '
        'runs.'
      )

  def _lock(self, folder: Path) -> bool:
    """Whether there are locks; this one is then had."""
    with folders.writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
      file = self._held.enter_context(open(folder / NAME, 'a+', encoding='utf-8'))
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise _taken(folder, _holder(file)) from None
    except OSError as error:
      if error.errno not in UNKNOWN:
        raise UserError(f'{file.name} cannot be locked: {error.strerror}.') from error
      return False
    with folders.writing(folder):
      file.truncate(0)
      file.write(f'{leases.holder()}\n')
      file.flush()
    return True

  def _lease(self, folder: epath.Path) -> None:
    lease = leases.Lease(folder / NAME)
    self._held.callback(lease.give_back)
    try:
      lease.take(
        lambda holder: self._tell(
          f'{folder} was being trained by {holder}: waiting up to {leases.LEASE_SECONDS:.0f} s to '
          'see whether it still is'
        ),
        self._look,
      )
    except leases.Held as held:
      raise _taken(folder, str(held)) from None


def _taken(folder: Path | epath.Path, holder: str) -> UserError:
  return UserError(
    f'{folder} is being trained by {holder}: wait for it to end, name other --runs, or choose '
    'another --workdir.'
  )


def _holder(file: IO[str]) -> str:
  file.seek(0)
  return file.read().strip() or 'another job'
