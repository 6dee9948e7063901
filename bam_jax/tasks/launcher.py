"""Limits a process and runs a program in it; `sandbox` starts it.

    python -I -S -B launcher.py CPU_SECONDS MEMORY_BYTES FILE_BYTES STATUS PROGRAM

STATUS is the exit status when the program has run to its end.

Imports nothing of bam_jax, so that it starts in milliseconds.
"""

import os
import resource
import sys


def limit(cpu_seconds: int, memory_bytes: int, file_bytes: int) -> None:
  """Limits this process for good; OSError when that is not possible."""
  for name, soft, hard in (
    (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
    (resource.RLIMIT_AS, memory_bytes, memory_bytes),
    (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
    (resource.RLIMIT_CORE, 0, 0),
    (resource.RLIMIT_NPROC, 0, 0),  # has no effect for root
  ):
    resource.setrlimit(name, (soft, hard))


def main() -> None:
  """Runs the program of the command line; what it needs to know is in no global of this module."""
  *limits, passed, path = sys.argv[1:]
  with open(path, encoding='utf-8', errors='surrogatepass') as file:
    program = file.read()
  os.unlink(path)
  sys.argv[1:] = []
  try:
    limit(*map(int, limits))
  except OSError as error:
    sys.exit(f'limits: {error}')
  exec(compile(program, 'program.py', 'exec'), {'__name__': '__main__'})
  os._exit(int(passed))


if __name__ == '__main__':
  main()
