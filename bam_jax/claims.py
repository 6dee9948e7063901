"""One job trains a run: a lock in its folder, held by the job's first process until it ends.

The system takes the lock back from a process that is killed. It holds between the hosts of a
network file system that passes locks on, as NFS does; where one knows no locks at all, as under
some FUSE mounts of buckets, `Claims` says so and nothing is locked.
"""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Self

from bam_jax import folders
from bam_jax.errors import UserError

NAME = 'lock'
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a system without locks says


class Claims:
  """The runs' folders that this job has for itself; a context manager, which gives them back."""

  def __init__(self):
    self._held = contextlib.ExitStack()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error) -> None:
    self._held.close()

  def take(self, runs: Iterable[Path]) -> list[str]:
    """Claims folders, making those that are not there; in a job, only its first process does.

    Returns:
      Sentences about locks that cannot be had.

    Raises:
      UserError: another job has one, or one cannot be written.
    """
    unknown = {}
    for folder in runs:
      with folders.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = self._held.enter_context(open(folder / NAME, 'a+', encoding='utf-8'))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise UserError(
          f'{folder} is being trained by {_holder(file)}: wait for it to end, name other --runs, '
          'or choose another --workdir.'
        ) from None
      except OSError as error:
        if error.errno not in UNKNOWN:
          raise UserError(f'{file.name} cannot be locked: {error.strerror}.') from error
        unknown[folder.parent] = (
          f'{folder.parent} is on a file system without locks: see to it that no other job trains '
          'the same runs.'
        )
        continue
      with folders.writing(folder):
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
        file.flush()
    return list(unknown.values())


def _holder(file: IO[str]) -> str:
  file.seek(0)
  return file.read().strip() or 'another job'
