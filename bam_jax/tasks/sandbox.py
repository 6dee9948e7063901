"""Runs programs that a model wrote, each in a limited process of its own.

A program finds an empty folder, no environment, and of the interpreter the standard library. It
cannot exceed its processor time, address space and file size, and is killed when its time is over.
It keeps the user's rights and network, which no limit here takes away: run programs of models that
you do not trust in a container.
"""

import contextlib
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile

from bam_jax.config import strict

SECONDS = 20  # wall-clock time, after which a program is killed
LIMITS = {
  resource.RLIMIT_CPU: 10,  # seconds
  resource.RLIMIT_AS: 2**30,  # bytes of address space, the interpreter's included
  resource.RLIMIT_FSIZE: 2**20,  # bytes of one file
  resource.RLIMIT_CORE: 0,
  resource.RLIMIT_NPROC: 0,  # has no effect for root
}
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
  # The status at the program's end: one that exits early does not pass.
  passed = 100 + secrets.randbelow(100)
  source = f'{program}\nraise SystemExit({passed})\n'.encode(errors='surrogatepass')
  line = [sys.executable, '-I', '-S', '-B', '-']
  with tempfile.TemporaryDirectory(prefix='bam_jax_') as cwd, tempfile.TemporaryFile() as stderr:
    streams = dict(stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr)
    with subprocess.Popen(line, cwd=cwd, env={}, start_new_session=True, **streams) as process:
      try:
        for name, max_value in LIMITS.items():  # before the interpreter is given the program
          resource.prlimit(process.pid, name, (max_value, max_value + 1))
        process.communicate(source, SECONDS)
      except subprocess.TimeoutExpired:
        return 'time'
      except (AttributeError, OSError) as error:
        return f'limits: {error}'
      finally:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, signal.SIGKILL)  # and what root's programs may have started
    stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - OUTPUT_BYTES))
    text = stderr.read().decode(errors='replace')
  status = process.returncode
  if status == passed:
    return ''
  return 'time' if status == -signal.SIGXCPU else text or f'status {status}'
