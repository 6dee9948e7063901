"""One job trains a run of a bucket: an object beside it, which its holder writes again and again.

A bucket knows no locks, and takes nothing back from a process that is killed. What it has is the
conditional write: of two that replace the same generation of an object, one is refused. So whoever
wants a lease watches its object. When that changes, its holder lives; when it does not change for
LEASE_SECONDS, its holder is lost, and is replaced. Nobody compares clocks.

This is weaker than a lock: a holder that was only cut off for so long learns of its end at its next
beat. It then ends at once, without saving, as what it writes is no longer its own.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorstore as ts
from etils import epath

from bam_jax.errors import UserError

BEAT_SECONDS = 10.0  # between two writes of a holder
LEASE_SECONDS = 60.0  # without one, after which it is lost
LOOK_SECONDS = 1.0  # between two looks of whoever waits
LOST = 1  # exit status


class Held(Exception):
  """Another job has the lease; the argument says which."""


class Lease:
  """The object at a path of a bucket."""

  def __init__(self, path: epath.Path):
    bucket, _, name = os.fspath(path).removeprefix('gs://').partition('/')
    self._path, self._id = path, uuid.uuid4().hex
    self._store = ts.KvStore.open({'driver': 'gcs', 'bucket': bucket, 'path': name}).result()
    self._generation = b''
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._beat, name='lease', daemon=True)

  def take(self, wait: Callable[[str], None], look: Callable[[], None] = lambda: None) -> None:
    """Takes the lease, and holds it until `give_back` or the end of the process.

    Args:
      wait: is told who may have been lost, when it takes time to see.
      look: is called again and again in that time; what it raises ends the wait.

    Raises:
      Held: its holder lives.
      UserError: the bucket does not let it be written.
    """
    try:
      seen = self._read()
      if seen.state == 'value' and not _is_gone(_facts(seen.value)):
        wait(_facts(seen.value)['holder'])
        seen = self._watch(seen, look)
      self._generation = self._write(_mine(self._id), seen.stamp.generation)
      if not self._generation:
        raise Held(_facts(self._read().value)['holder'])
    except ValueError as error:
      raise UserError(f'{self._path} cannot be written: {str(error).splitlines()[0]}.') from error
    self._thread.start()

  def give_back(self) -> None:
    """Deletes the object, if it is still ours."""
    self._ended.set()
    if self._thread.is_alive():
      self._thread.join()
    if self._generation:
      with contextlib.suppress(ValueError):  # it will be found to be lost
        self._write(None, self._generation)
      self._generation = b''

  def _watch(self, seen: Any, look: Callable[[], None]) -> Any:
    """What is there when its holder has given it back, or has been lost; Held if neither."""
    until = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < until:
      time.sleep(LOOK_SECONDS)
      look()
      now = self._read()
      if now.state != 'value':
        return now
      if now.stamp.generation != seen.stamp.generation:
        raise Held(_facts(now.value)['holder'])
    return seen

  def _beat(self) -> None:
    while not self._ended.wait(BEAT_SECONDS):
      with contextlib.suppress(ValueError):  # out of reach: the next beat may get there
        if generation := self._write(_mine(self._id), self._generation):
          self._generation = generation
          continue
        now = self._read()
        # A write whose answer was lost is repeated, and then refused.
        if now.state == 'value' and _facts(now.value).get('id') == self._id:
          self._generation = now.stamp.generation
          continue
        other = _facts(now.value)['holder'] if now.state == 'value' else 'nobody'
        print(
          f'{self._path} is held by {other} now, since this process was not heard of for '
          f'{LEASE_SECONDS:.0f} s: it ends.',
          file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(LOST)

  def _read(self) -> Any:
    return self._store.read('').result()

  def _write(self, value: bytes | None, generation: bytes) -> bytes:
    """The new generation, or b'' if the one to replace is not there."""
    return self._store.write('', value, if_equal=generation).result().generation


def holder() -> str:
  """What this process calls itself."""
  return f'process {os.getpid()} on {socket.gethostname()}'


def _mine(name: str) -> bytes:
  facts = {'holder': holder(), 'id': name, 'pid': os.getpid(), 'kernel': _kernel()}
  return json.dumps(facts).encode()


def _facts(value: bytes) -> dict[str, Any]:
  try:
    facts = json.loads(value)
    return facts if isinstance(facts['holder'], str) else {'holder': 'another job'}
  except (ValueError, KeyError, TypeError):
    return {'holder': 'another job'}


def _is_gone(facts: dict[str, Any]) -> bool:
  """Whether the holder was a process of this machine, and is no more."""
  if not facts.get('kernel') or facts['kernel'] != _kernel():
    return False
  try:
    os.kill(facts['pid'], 0)
  except ProcessLookupError:
    return True
  except PermissionError:
    pass
  return False


def _kernel() -> str:
  """Names the table that process numbers are of: a boot, and a container's part of it."""
  try:
    boot = Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return ''
