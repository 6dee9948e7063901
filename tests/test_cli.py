"""What all commands share, where no command's own tests show it: `--json`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bam_jax import cli
from bam_jax.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize('name, reason', [
  ('', 'Is a directory'), ('file/b.json', 'Not a directory'), ('x' * 300, 'File name too long'),
  ('link', 'No such file or directory'), ('loop', 'Too many levels of symbolic links'),
])  # fmt: skip
def test_what_cannot_be_written_is_said_at_once(tmp_path, name, reason):
  (tmp_path / 'file').write_text('')
  (tmp_path / 'link').symlink_to(tmp_path / 'nowhere' / 'file')
  (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
  with pytest.raises(UserError, match=f'^--json=.* cannot be written: {reason}.$'):
    cli.check_json(os.path.join(tmp_path, name))


def test_a_run_is_refused_before_it_begins(server, tmp_path):
  flags = '--config=configs/quickstart.py:smoke', f'--workdir={tmp_path}/w', f'--json={tmp_path}'
  server.run('main', *flags, folder=ROOT).refused(
    f'bam_jax.main: --json={tmp_path} cannot be written: Is a directory.\n'
  )
  assert not (tmp_path / 'w').exists()


COMMAND = """
import os, signal, sys
from bam_jax import cli

def main():
  {}

sys.argv[0] = 'x.py'
cli.run(main)
"""


def command(body, *arguments, **options):
  """A command of one line."""
  line = [sys.executable, '-c', COMMAND.format(body), *arguments]
  return subprocess.run(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


def test_ctrl_c_is_no_traceback():
  done = command('os.kill(os.getpid(), signal.SIGINT)')
  assert (done.returncode, done.stderr) == (130, 'bam_jax.x: interrupted.\n')


def test_a_reader_that_left_is_no_traceback():
  read, write = os.pipe()
  os.close(read)
  done = command('return {"x": "x" * 10**5}', '--json=-', stdout=write)
  os.close(write)
  assert (done.returncode, done.stderr) == (141, '')


def test_standard_output_on_a_full_disk():
  with open('/dev/full', 'w') as full:
    done = command('return {}', '--json=-', stdout=full)
  said = 'bam_jax.x: --json=- cannot be written: No space left on device.\n'
  assert (done.returncode, done.stderr) == (2, said)


def test_a_recipe_may_import_what_is_beside_it(server, tmp_path):
  """From whatever folder the command runs in."""
  (tmp_path / 'beside_it.py').write_text('NAME = "a name with spaces"\n')
  recipe = tmp_path / 'recipe.py'
  recipe.write_text('import beside_it\ndef get_config():\n  raise ValueError(beside_it.NAME)\n')
  outcome = server.run('main', f'--config={recipe}', '--workdir=nowhere').check('recipe.py')
  assert 'line 3' in outcome.sentence and 'a name with spaces' in outcome.sentence
