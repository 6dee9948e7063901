"""One job trains a run: a lock in its folder, held by the job's first process until it ends.

On a disk it is `flock`, which the system releases when a process is killed, and which works across
the hosts of a network file system that forwards locks, such as NFS.

A bucket has conditional writes instead: of two that replace the same generation of an object, one
fails. There it is a lease, an object that its holder rewrites regularly. If it does not change for
LEASE_SECONDS, another job takes it over; clocks are never compared. A holder that was only cut off
notices the takeover at its next renewal, and exits at once, without saving.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tensorstore as ts
from etils import epath

from bam_jax.errors import UserError
from bam_jax.files import folders

NAME = 'lock'
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of file systems without locks
BEAT_SECONDS = 10.0  # between two renewals
LEASE_SECONDS = 60.0  # without a renewal, after which the holder is lost
POLL_SECONDS = 1.0  # between two reads of a waiting job
LOST = 1  # exit status of a holder that was replaced


class Claims(contextlib.ExitStack):
  """The folders of runs claimed by this job; a context manager, which releases them.

  `report` is called when locks are unavailable or take time; an exception of `poll` ends the wait.
  """

  def __init__(self, report: Callable[[str], None], poll: Callable[[], None] = lambda: None):
    super().__init__()
    self._report, self._poll = report, poll

  def take(self, runs: Iterable[Path | epath.Path]) -> None:
    """Creates and claims folders; UserError if another job holds one, or it cannot be written."""
    runs = list(runs)
    leases = [Lease(folder) for folder in runs if folders.in_bucket(folder)]
    for lease in leases:
      self.callback(lease.give_back)
    with concurrent.futures.ThreadPoolExecutor(max(1, len(leases))) as pool:
      list(pool.map(lambda lease: lease.take(self._report, self._poll), leases))
    local = [folder for folder in runs if not folders.in_bucket(folder)]
    for workdir in {folder.parent for folder in local if not self._lock(folder)}:
      self._report(
        f'{workdir} is on a file system without locks: make sure that no other job trains the same '
        'runs.'
      )

  def _lock(self, folder: Path) -> bool:
    """Acquires the lock; returns whether the file system supports locks."""
    with folders.writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
      file = self.enter_context(open(folder / NAME, 'a+', encoding='utf-8'))
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise _taken(folder, file.read().strip() or 'another job') from None
    except OSError as error:
      if error.errno not in UNKNOWN:
        raise UserError(f'{file.name} cannot be locked: {error.strerror}.') from error
      return False
    with folders.writing(folder):
      file.truncate(0)
      file.write(f'{_holder()}\n')
      file.flush()
    return True


class Lease:
  """The object NAME of a folder in a bucket."""

  def __init__(self, folder: epath.Path):
    self._folder, self._generation = folder, b''
    self._content = f'{_holder()}, lease {uuid.uuid4().hex}'.encode()
    self._store = ts.KvStore.open(folders.url(folder)).result()
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._beat, name='lease', daemon=True)

  def take(self, report: Callable[[str], None], poll: Callable[[], None]) -> None:
    """Acquires it until `give_back`; UserError if its holder is alive, or it cannot be written."""
    try:
      seen = self._read()
      if seen.state == 'value':
        report(
          f'{self._folder} was being trained by {_holder_of(seen)}: waiting up to '
          f'{LEASE_SECONDS:.0f} s to see whether it still is'
        )
        seen = self._watch(seen, poll)
      self._generation = self._write(self._content, seen.stamp.generation)
      if not self._generation:
        raise _taken(self._folder, _holder_of(self._read()))
    except ValueError as error:
      reason = folders.first_line(error)
      raise UserError(f'{self._folder}/{NAME} cannot be written: {reason}.') from error
    self._thread.start()

  def give_back(self) -> None:
    """Deletes the object, if it is still ours."""
    self._ended.set()
    if self._thread.is_alive():
      self._thread.join()
    if self._generation:
      with contextlib.suppress(ValueError):  # it will expire
        self._write(None, self._generation)
      self._generation = b''

  def _watch(self, seen: Any, poll: Callable[[], None]) -> Any:
    """The object after its holder has released it or is lost; UserError if it is still held."""
    until = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < until:
      time.sleep(POLL_SECONDS)
      poll()
      now = self._read()
      if now.state != 'value':
        return now
      if now.stamp.generation != seen.stamp.generation:
        raise _taken(self._folder, _holder_of(now))
    return seen

  def _beat(self) -> None:
    while not self._ended.wait(BEAT_SECONDS):
      with contextlib.suppress(ValueError):  # unreachable: the next renewal may succeed
        if generation := self._write(self._content, self._generation):
          self._generation = generation
          continue
        now = self._read()
        if now.value == self._content:  # a write whose reply was lost is repeated, then refused
          self._generation = now.stamp.generation
          continue
        what = f'was taken over by {_holder_of(now)}, since this process did not renew its'
        sentence = f'{self._folder} {what} lease for {LEASE_SECONDS:.0f} s: exiting.'
        print(sentence, file=sys.stderr, flush=True)
        os._exit(LOST)

  def _read(self) -> Any:
    return self._store.read(NAME).result()

  def _write(self, value: bytes | None, generation: bytes) -> bytes:
    """The new generation, or b'' if the one to replace has changed."""
    return self._store.write(NAME, value, if_equal=generation).result().generation


def _taken(folder: Path | epath.Path, holder: str) -> UserError:
  return UserError(
    f'{folder} is being trained by {holder}: wait for it to end, choose other --runs or '
    'another --workdir.'
  )


def _holder() -> str:
  return f'process {os.getpid()} on {socket.gethostname()}'


def _holder_of(seen: Any) -> str:
  """Who wrote a lease."""
  return seen.value.decode(errors='replace') or 'another job'
