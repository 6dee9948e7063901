"""A cloud for each test, a house to launch from, and the commands as users start them."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.cloud import Cloud

ROOT = Path(__file__).parents[2]
DEADLINE = 300  # seconds that a test waits at most, on a machine that does much else; no measure
TIMES = dict(
  BAM_POLL='0.3', BAM_WAIT='100', BAM_BACKOFF='0', BAM_ROUNDS='2', BAM_GRACE='5',
  BAM_FAIL_GRACE='2', BAM_SETTLE='0', BAM_SILENCE='3',
)  # fmt: skip


class Launcher:
  """The commands of launch/, run in `house` against `cloud`."""

  def __init__(self, cloud: Cloud, house: Path, gcloud: Path, temporary: Path):
    self.cloud, self.house = cloud, house
    self.env = {
      **{key: value for key, value in os.environ.items() if not key.startswith('BAM_')},
      'PATH': f'{gcloud}:{os.environ["PATH"]}',
      'STAND_IN': str(cloud.folder),
      'STAND_IN_PYTHON': sys.executable,
      'TMPDIR': str(temporary),
      'USER': 'Some.One',
      'BAM_ZONES': 'zone-a,zone-b',
      'BAM_TYPE': 'v5e-8',
      **TIMES,
    }

  def __call__(self, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Runs `launch/tpu ARGUMENTS…` to its end."""
    process = self.start(*arguments, **env)
    out, err = process.communicate(timeout=DEADLINE)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)

  def start(self, *arguments: str, program: str = 'tpu', **env: str) -> subprocess.Popen:
    """Starts it as a shell would: in a process group of its own."""
    return subprocess.Popen(
      [self.house / 'launch' / program, *arguments],
      env={**self.env, **env},
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )

  def resources(self) -> list[str]:
    """All that costs money now, ZONE/NAME."""
    state = self.cloud.read()
    return sorted({*state['requests'], *state['nodes']})


def wait_for(what: Callable[[], object], seconds: float = DEADLINE) -> None:
  """Waits until `what()` is true; a test's deadline, not its measure."""
  end = time.monotonic() + seconds
  while not what():
    assert time.monotonic() < end, 'it has not come true'
    time.sleep(0.02)


def interrupt(process: subprocess.Popen) -> tuple[int, str, str]:
  """Ctrl-C: SIGINT to the whole process group, as a terminal sends it."""
  os.killpg(process.pid, signal.SIGINT)
  out, err = process.communicate(timeout=DEADLINE)
  return process.returncode, out, err


@pytest.fixture(scope='session')
def house(tmp_path_factory) -> Path:
  """A repository with launch/ and little else, in a folder whose name has spaces."""
  house = tmp_path_factory.mktemp('a house') / "one's own"
  shutil.copytree(ROOT / 'launch', house / 'launch')
  (house / 'requirements.txt').write_text('numpy\n')
  (house / 'words.txt').write_text('sent with the commit\n')
  git(house, 'init', '--quiet', '--initial-branch=main')
  git(house, 'add', '--all')
  git(house, 'commit', '--quiet', '--message=All of it')
  return house


def git(folder: Path, *arguments: str) -> str:
  """Runs git there, as somebody."""
  who = ['-c', 'user.name=Someone', '-c', 'user.email=someone@example.com']
  return subprocess.run(
    ['git', *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
  ).stdout.strip()


@pytest.fixture(scope='session')
def gcloud(tmp_path_factory) -> Path:
  """A folder whose `gcloud` is the stand-in."""
  folder = tmp_path_factory.mktemp('bin')
  program = folder / 'gcloud'
  script = Path(__file__).with_name('gcloud_stand_in.py')
  program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S -E '{script}' \"$@\"\n")
  program.chmod(0o755)
  return folder


@pytest.fixture
def cloud() -> Iterator[Cloud]:
  """An empty cloud; what its workers run ends with the test."""
  cloud = Cloud.found(Path(tempfile.mkdtemp(prefix='bam', dir='/tmp')))
  yield cloud
  cloud.tear_down()


@pytest.fixture
def tpu(cloud, house, gcloud, tmp_path) -> Launcher:
  """`launch/tpu` against `cloud`."""
  (tmp_path / 'a temporary folder').mkdir()
  return Launcher(cloud, house, gcloud, tmp_path / 'a temporary folder')
