"""What all commands share, where no command's own tests show it: `--json`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bam_jax import cli
from bam_jax.errors import UserError

ROOT = Path(__file__).parent.parent


def test_json_makes_its_folder(tmp_path):
  path = tmp_path / 'a' / 'b.json'
  cli.check_json(str(path))
  assert not path.parent.exists(), 'checking changes nothing'
  cli.write_json(str(path), {'x': 1})
  cli.check_json(str(path))
  cli.write_json(str(path), {'x': 2})
  assert json.loads(path.read_text()) == {'x': 2}
  cli.check_json('-')
  cli.check_json(os.path.relpath(path))


@pytest.mark.parametrize(
  'name, said',
  [
    ('', 'that is a folder'),
    ('file/b.json', 'file is no folder'),
    ('file/c/b', 'file is no folder'),
  ],
)
def test_what_cannot_be_written_is_said_at_once(tmp_path, name, said):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=f'^--json=.* cannot be written: .*{said}.$'):
    cli.check_json(os.path.join(tmp_path, name))


def test_a_link_to_nothing_is_a_file_to_be_made(tmp_path):
  (tmp_path / 'link').symlink_to(tmp_path / 'file')
  cli.check_json(str(tmp_path / 'link'))
  cli.write_json(str(tmp_path / 'link'), {})
  assert (tmp_path / 'file').read_text() == '{}\n'


def test_a_run_is_refused_before_it_begins(tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'bam_jax.main', '--config=configs/quickstart.py:smoke',
     f'--workdir={tmp_path}/w', f'--json={tmp_path}'],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr == f'bam_jax.main: --json={tmp_path} cannot be written: that is a folder.\n'
  assert not (tmp_path / 'w').exists()
