"""Runs programs that a model wrote, each in a limited process of its own.

A program finds an empty folder, no environment, and of the interpreter the standard library. It
cannot exceed its processor time, address space and file size, and is killed when its time is over.
It keeps the user's rights and network, which no limit here takes away: run programs of models that
you do not trust in a container.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from bam_jax.config import strict

LAUNCHER = str(Path(__file__).with_name('launcher.py'))
SECONDS = 20  # wall-clock time, after which a program is killed
CPU_SECONDS = 10
MEMORY_BYTES = 2**30  # address space, the interpreter's included
FILE_BYTES = 2**20  # of one file
OUTPUT_BYTES = 2000  # of standard error that are kept


def require() -> None:
  """UserError when this machine cannot set the limits."""
  failure = run('pass')
  wrong = f'requires limits that this machine does not support ({failure.strip()})'
  strict.require(not failure, f'--allow_generated_code {wrong}: remove the tasks that run code.')


def run(program: str) -> str:
  """Runs a Python program in a limited process; runs nothing where limits cannot be set.

  Returns '' if it ran to its end and nothing raised, else why it failed: 'time', or the end of what
  it wrote to standard error.
  """
  # The launcher's status at the program's end: a program that exits early does not pass.
  passed = 100 + secrets.randbelow(100)
  limits = map(str, (CPU_SECONDS, MEMORY_BYTES, FILE_BYTES, passed))
  with tempfile.TemporaryDirectory(prefix='bam_jax_') as folder:
    cwd, source, output = (Path(folder, name) for name in ('empty', 'program.py', 'output'))
    cwd.mkdir()
    source.write_text(program, encoding='utf-8', errors='surrogatepass')
    line = [sys.executable, '-I', '-S', '-B', LAUNCHER, *limits, source]
    with output.open('wb') as stderr:
      streams = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr)
      process = subprocess.Popen(line, cwd=cwd, env={}, start_new_session=True, **streams)
      try:
        status = process.wait(SECONDS)
      except subprocess.TimeoutExpired:
        return 'time'
      finally:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, signal.SIGKILL)  # and what root's programs may have started
        process.wait()
    if status == passed:
      return ''
    text = output.read_bytes()[-OUTPUT_BYTES:].decode(errors='replace')
  return 'time' if status == -signal.SIGXCPU else text or f'status {status}'
