"""The scripts as text: shellcheck, what they document, and the examples' command lines."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT

LAUNCH = ROOT / 'launch'
PROGRAMS = ['tpu', 'recipe', 'settings.sh', 'lib/worker.sh', 'examples/slurm.sh', 'examples/gke.sh']
# Of `xpk workload create`, version 1.16.
XPK_FLAGS = set(
  'project zone cluster workload tpu-type device-type num-slices base-docker-image script-dir '
  'docker-image max-restarts restart-on-exit-codes termination-grace-period-seconds command env '
  'env-file priority spot on-demand reservation flex'.split()
)


def test_shellcheck():
  beside = shutil.which('shellcheck', path=Path(sys.executable).parent)
  program = beside or shutil.which('shellcheck')
  assert program, "pip install -e '.[dev]'"
  done = subprocess.run(
    [program, '--external-sources', *(f'launch/{name}' for name in PROGRAMS)],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout


def recorder(folder: Path, name: str, code: int = 0) -> Path:
  """A program that writes its arguments, one a line, and ends with `code`; where it writes them."""
  record = folder / f'{name}.arguments'
  program = folder / name
  program.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >'{record}'\nexit {code}\n")
  program.chmod(0o755)
  return record


def test_gke_example(tmp_path):
  record = recorder(tmp_path, 'xpk')
  flags = ['--config=configs/x.py', "--workdir=gs://b/it's mine"]
  place = {'PROJECT': 'p', 'ZONE': 'z', 'CLUSTER': 'c', 'TYPE': 'v6e-16'}
  subprocess.run(
    [LAUNCH / 'examples' / 'gke.sh', 'my-exp', *flags],
    env={'PATH': f'{tmp_path}:/usr/bin:/bin', **place},
    check=True,
  )
  words = record.read_text().splitlines()
  assert words[:2] == ['workload', 'create']
  asked = dict(word.removeprefix('--').split('=', 1) for word in words[2:])
  assert asked.keys() <= XPK_FLAGS
  assert asked['tpu-type'] == 'v6e-16' and asked['workload'] == 'my-exp'
  # The shell of the container reads the arguments as they were given.
  echoed = asked['command'].split('&& exec ')[1].replace('python -m bam_jax.main', 'printf %s\\\\n')
  said = subprocess.run(['bash', '-c', echoed], capture_output=True, text=True, check=True)
  assert said.stdout.splitlines() == flags


@pytest.mark.parametrize('code', [1, 143])
def test_slurm_example(tmp_path, code):
  record, again = recorder(tmp_path, 'srun', code), recorder(tmp_path, 'scontrol')
  done = subprocess.run(
    [LAUNCH / 'examples' / 'slurm.sh', '--config=configs/x.py', '--workdir=/scratch/my exp'],
    env={'PATH': f'{tmp_path}:/usr/bin:/bin', 'SLURM_JOB_ID': '42'},
  )
  assert done.returncode == code and again.exists() == (code == 143)
  assert record.read_text().splitlines() == [
    '--kill-on-bad-exit=1', '.venv/bin/python', '-m', 'bam_jax.main', '--coordinator=auto',
    '--config=configs/x.py', '--workdir=/scratch/my exp',
  ]  # fmt: skip
