"""TensorBoard's event files, written where they are asked for: a disk that is full raises there.

The library's own writer has a thread for it, in which an error is a traceback and no more.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import tensorboardX
from tensorboardX.proto import event_pb2, summary_pb2

from bam_jax.files import buckets


class Events:
  """A new file of scalars beside those of earlier attempts; OSError when the disk takes no more."""

  def __init__(self, folder: Path, first_step: int):
    """Opens it; what earlier files have from `first_step` on is no longer shown."""
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time()
    name = f'events.out.tfevents.{now:.0f}.{socket.gethostname()}.{os.getpid()}'
    self._mirror = buckets.Mirror(folder / name)
    self._writer = tensorboardX.RecordWriter(str(self._mirror.path))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(event_pb2.Event(wall_time=now, file_version='brain.Event:2'))
    self._write(event_pb2.Event(wall_time=now, step=first_step, session_log=start))

  def write(self, step: int, scalars: Iterable[tuple[str, float]]) -> None:
    """Writes a point of each curve."""
    values = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars]
    summary = summary_pb2.Summary(value=values)
    self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

  def flush(self) -> None:
    """Lets others see what was written."""
    self._writer.flush()
    self._mirror.send()

  def close(self) -> None:
    """Closes the file, which is then where it was asked for, or was given up."""
    with contextlib.suppress(OSError):
      self._writer.close()
    self._mirror.close()

  def _write(self, event: event_pb2.Event) -> None:
    self._writer.write(event.SerializeToString())
