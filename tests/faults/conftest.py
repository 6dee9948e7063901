"""A run to which nothing happened, and a disk of a test's own."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_main import run

SEED = ('--runs=seed',)


@pytest.fixture(scope='package')
def undisturbed(text, tmp_path_factory) -> Path:
  """A workdir in which a run of 12 steps has ended; checkpoints 9 and 12 are kept."""
  workdir = tmp_path_factory.mktemp('undisturbed')
  done = run(text, workdir, *SEED)
  assert done.returncode == 0, done.stderr
  return workdir


@pytest.fixture
def copied(undisturbed, tmp_path) -> Path:
  """A copy of it that a test may damage."""
  return shutil.copytree(undisturbed, tmp_path / 'copied')


def remount(folder: Path, option: str) -> None:
  subprocess.run(['mount', '-o', f'remount,{option}', str(folder)], check=True)


def assert_sentence(done: subprocess.CompletedProcess, *words: str) -> None:
  """Status 2, and the last line is one sentence."""
  assert done.returncode == 2, done.stderr
  assert 'Traceback' not in done.stderr and 'Exception' not in done.stderr, done.stderr
  for word in words:
    assert word in done.stderr.splitlines()[-1], done.stderr
