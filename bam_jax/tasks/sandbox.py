"""Programs that a model wrote, each run in a process of its own with limits.

A program finds an empty folder and no environment, and of the interpreter the standard library. It
cannot start processes or threads, open sockets, or signal others, nor take more than its processor
time, addresses and bytes of a file; it is killed when its time is over. It has the user's rights to
files, which no limit here takes away: run what may be hostile in a container.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from bam_jax.errors import UserError

LAUNCHER = str(Path(__file__).with_name('launcher.py'))
SECONDS = 20  # of a clock
CPU_SECONDS = 10
MEMORY_BYTES = 2**30  # of addresses, those of the interpreter included
FILE_BYTES = 2**20  # of a file
OUTPUT_BYTES = 2000  # of standard error that are kept


class Result(NamedTuple):
  """How a program ended."""

  passed: bool  # whether its last line was reached, and nothing raised
  why: str  # else: 'time', or the end of what it wrote to standard error


def require() -> None:
  """UserError when this machine cannot put the limits."""
  result = run('pass')
  if not result.passed:
    why = result.why.strip()
    raise UserError(
      f'--allow_generated_code needs limits that this machine does not have ({why}): leave out the '
      'tasks that run code.'
    )


def run(
  program: str,
  seconds: float = SECONDS,
  cpu_seconds: int = CPU_SECONDS,
  memory_bytes: int = MEMORY_BYTES,
  file_bytes: int = FILE_BYTES,
) -> Result:
  """Runs a program of Python in a process with limits; nothing runs where they cannot be put.

  Args:
    program: its text.
    seconds: of a clock, after which it is killed.
    cpu_seconds: of a processor.
    memory_bytes: of addresses.
    file_bytes: that a file may have, standard error included.
  """
  limits = [str(cpu_seconds), str(memory_bytes), str(file_bytes)]
  # Written by the launcher when the program is through: leaving early does not pass.
  secret = secrets.token_hex(16)
  with tempfile.TemporaryDirectory(prefix='bam_jax_') as folder:
    place, source, said = (Path(folder, name) for name in ('empty', 'program.py', 'said'))
    place.mkdir()
    source.write_text(program, encoding='utf-8', errors='surrogatepass')
    through, end = os.pipe()
    with said.open('wb') as errors, open(through, 'rb') as reader:
      try:
        process = subprocess.Popen(
          [sys.executable, '-I', '-S', '-B', LAUNCHER, *limits, secret, str(end), str(source)],
          cwd=place,
          env={},
          stdin=subprocess.DEVNULL,
          stdout=subprocess.DEVNULL,
          stderr=errors,
          pass_fds=(end,),
          start_new_session=True,
        )
      finally:
        os.close(end)
      try:
        status = process.wait(seconds)
      except subprocess.TimeoutExpired:
        return Result(False, 'time')
      finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and nothing of it is left
          os.killpg(process.pid, signal.SIGKILL)
        process.wait()
      passed = reader.read(len(secret)) == secret.encode()
    words = said.read_bytes()[-OUTPUT_BYTES:].decode(errors='replace')
  if passed:
    return Result(True, '')
  return Result(False, 'time' if status == -signal.SIGXCPU else words or f'status {status}')
