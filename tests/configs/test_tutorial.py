"""docs/tutorial.md: its recipe is one, and its commands have the flags that it gives them."""

import re
import runpy
import shlex
from pathlib import Path

from bam_jax import config
from bam_jax.cli import recipe_file

ROOT = Path(__file__).parents[2]


def test_the_recipe():
  path = str(ROOT / 'configs' / 'tutorial.py')
  with recipe_file.importable([f'--config={path}']):
    recipe = config.parse(runpy.run_path(path)['get_config']().to_dict())
  assert recipe.total_steps('bam') == 8


def test_the_commands(server):
  text = (ROOT / 'docs' / 'tutorial.md').read_text(encoding='utf-8').replace('\\\n', ' ')
  lines = re.findall(r'^python -m bam_jax\.((?:convert )?[\w-]+) (.*)$', text, re.MULTILINE)
  assert len(lines) == 10
  for command, rest in lines:
    given = {word[2:].partition('=')[0] for word in shlex.split(rest) if word[:2] == '--'}
    assert given and given <= {flag['name'] for flag in server.flags(command)}, command
