"""What tests of buckets share: the server's switches, and the commands as users start them."""

import contextlib
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator

from etils import epath

from tests import test_main


@contextlib.contextmanager
def holding(pattern: str) -> Iterator[Callable[[], int]]:
  """Nothing is written whose name the pattern is found in; yields how many writers wait."""
  url = os.environ['STORAGE_EMULATOR_HOST']
  ask = lambda path, data=None: urllib.request.urlopen(f'{url}{path}', data).read()
  ask('/hold', pattern.encode())
  try:
    yield lambda: int(ask('/held'))
  finally:
    ask('/hold', b'')


def command(module: str, *flags: str) -> subprocess.CompletedProcess:
  """Runs `python -m bam_jax.MODULE` to its end, on one device."""
  return subprocess.run(
    [sys.executable, '-m', f'bam_jax.{module}', *flags],
    cwd=test_main.ROOT, env=test_main.environment(), capture_output=True, text=True, timeout=300,
  )  # fmt: skip


def files(path: epath.Path) -> list[str]:
  """The names of all that is below a folder of a bucket."""
  import fsspec

  found = fsspec.filesystem('gcs').find(os.fspath(path))
  return [name.removeprefix(f'{os.fspath(path)}/'.removeprefix('gs://')) for name in found]
