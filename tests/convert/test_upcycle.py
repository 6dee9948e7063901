"""`convert` as its users run it: a whole process, with whole sentences, killed, on a full disk."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bam_jax import checkpoint, config
from bam_jax.errors import UserError
from tests.upcycle import memory

ROOT = Path(__file__).parents[2]
# Large enough that a process can be stopped in the middle of it, at 4 MB a matrix.
MODEL = config.Model(
  vocab_size=1000, d_model=512, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, ffn_dim=2048
)
NAMES = ('seed', 'code')
FLAGS = '--experts=3', '--seed=5', '--name=bam', '--norms=fold', '--untie', '--length=7'


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('runs')
  for number, name in enumerate(NAMES):
    memory.save(folder / name, memory.draw(MODEL, number), MODEL)
  return folder


def command(runs: Path, output: Path, *flags: str) -> list[str]:
  sources = [f'--from={runs / name}' for name in NAMES]
  start = [sys.executable, '-m', 'bam_jax.convert', 'upcycle', '--method=bam_kv_experts']
  return [*start, '--renormalize', *sources, f'--output={output}', *flags]


def run(line: list[str], **more) -> subprocess.CompletedProcess:
  return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, **more)


@pytest.fixture(scope='module')
def made(runs, tmp_path_factory) -> Path:
  """What an undisturbed process makes."""
  output = tmp_path_factory.mktemp('made') / 'mix'
  line = command(runs, output, '--json=-', *FLAGS)
  done = run(line)
  assert done.returncode == 0, done.stderr
  assert 'The routers of FFN choose one expert' in done.stderr  # attention is soft
  facts, meta = json.loads(done.stdout), checkpoint.read_meta(output)
  assert facts['output'] == str(output) and facts['seconds'] > 0
  assert facts['meta']['model']['ffn_experts']['num_experts'] == 3
  assert meta.manifest.command.split()[1:] == line[1:]
  assert (meta.manifest.seed, meta.manifest.name) == (5, 'bam')
  assert meta.sequence_length == 7 and not meta.model.tied_embeddings
  return output


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_is_taken_for_a_checkpoint(runs, made, tmp_path):
  output = tmp_path / 'mix'
  line = command(runs, output, *FLAGS)
  moments = {
    'as it begins': lambda folder: True,
    'a third': lambda folder: size(folder) > 20e6,
    'two thirds': lambda folder: size(folder) > 40e6,
    'at the end': lambda folder: (folder / 'tokenizer.json').exists(),
  }
  for moment, reached in moments.items():
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not any(map(reached, tmp_path.glob(f'mix.partial-{process.pid}-*'))):
      assert process.poll() is None, f'{moment}: it ended before it could be killed'
      time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if output.exists():  # it was done before the signal came
      assert moment == 'at the end'
      break
    assert checkpoint.finished_step(tmp_path) is None
    for left in [tmp_path, *tmp_path.iterdir()]:
      with pytest.raises(UserError, match='holds no checkpoint'):
        checkpoint.find(left)
  if not output.exists():
    again = run(line)
    assert again.returncode == 0, again.stderr
  assert [path.name for path in tmp_path.iterdir()] == ['mix'], 'what was left behind is removed'
  for path, want in memory.values(made).items():
    np.testing.assert_array_equal(memory.values(output)[path], want)


def size(folder: Path) -> int:
  """Bytes of the files that are still there when they are looked at."""
  total = 0
  for parent, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        total += os.path.getsize(os.path.join(parent, name))
  return total


def test_a_disk_that_takes_no_more(runs, tmp_path):
  line = ['prlimit', '--fsize=4000000', *command(runs, tmp_path / 'mix')]
  # Of Linux alone (util-linux): macOS has nothing that bounds another program's files this way.
  if not shutil.which(line[0]):
    pytest.skip('without prlimit, a disk cannot be made to take no more')
  done = run(line)
  assert_sentence(done.returncode, done.stderr, ['cannot be written', 'File too large'])
  assert list(tmp_path.iterdir()) == []


def assert_sentence(status: int, stderr: str, words: list[str]) -> None:
  """Status 2 and one sentence, below the progress bar if it had begun."""
  lines = [line for line in stderr.splitlines() if line.strip() and ' ━' not in line]
  assert status == 2, stderr
  assert len(lines) == 1 and lines[0].startswith('bam_jax.convert'), stderr
  for word in words:
    assert word in lines[0]


MIX = 'upcycle', '--from=x', '--from=z', '--method=btx', '--output=y'


@pytest.mark.parametrize('arguments, words', [
  ([], ['upcycle', 'inspect', '--help']), (['upcylce'], ['upcylce', 'upcycle']),
  (['upcycle', '--method=bam'], ['--method', 'bam_kv_experts']),
  ([*MIX, '--experts=1'], ['--experts=1', "--from=['x', 'z']"]),
  ([*MIX, '--top_k=1'], ['x holds no checkpoint']),
])  # fmt: skip
def test_misuse_is_answered_in_a_sentence(server, arguments, words):
  done = server.run('convert', *arguments)
  assert_sentence(done.status, done.stderr, words)
