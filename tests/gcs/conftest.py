"""A service of buckets, in a process of its own, and the commands as users start them."""

import contextlib
import os
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from etils import epath

from bam_jax import folders
from tests import test_main

SERVER = Path(__file__).with_name('server.py')


def serve(*buckets: str) -> tuple[subprocess.Popen, dict[str, str]]:
  """A server with these buckets, and the variables that lead the clients of buckets to it."""
  server = subprocess.Popen([sys.executable, SERVER, *buckets], stdout=subprocess.PIPE, text=True)
  url = server.stdout.readline().strip()
  return server, {
    'STORAGE_EMULATOR_HOST': url,
    'TENSORSTORE_GCS_HTTP_URL': url,
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
    # It asks for the kind of a bucket by gRPC, which the server does not speak.
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
  }


@pytest.fixture(scope='package')
def service(tmp_path_factory) -> Iterator[None]:
  """The time in which `gs://bucket` is there, empty at first, for this process and its children."""
  server, environment = serve('bucket')
  environment['XDG_CACHE_HOME'] = str(tmp_path_factory.mktemp('cache'))
  with pytest.MonkeyPatch.context() as patch:
    for name, value in environment.items():
      patch.setenv(name, value)
    yield
  server.kill()
  server.communicate()


@pytest.fixture
def folder(service) -> epath.Path:
  """A folder of the bucket that nobody else writes to."""
  return folders.reach(f'gs://bucket/{uuid.uuid4().hex[:8]}')


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
