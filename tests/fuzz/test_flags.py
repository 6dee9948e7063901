"""Every flag of every command, asked of the commands themselves, with values of all kinds."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.commands import commands
from tests.fuzz import values

COMMANDS = [
  command if command == 'generate' else pytest.param(command, marks=pytest.mark.slow)
  for command in commands()
]


@pytest.mark.parametrize('command', COMMANDS)
def test_any_value_of_any_flag(server, world, tmp_path, command):
  try_all(server, world.refused, tmp_path / 'here', command, one_of=3)


def try_all(server, line_of, folder, command: str, one_of: int) -> None:
  """Gives every flag one of so many values, of all kinds; the sentence, if any, is about it."""
  flags = server.flags(command)
  assert {flag['name'] for flag in flags} >= {'json'}

  def run(*argument: str):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return server.run(command, *line_of(command, folder / 'output'), *argument, folder=folder)

  def give(name: str, value: str) -> None:
    outcome = run(f'--{name}={value}')
    words = [printable(word)[:20] for word in value.split('=') if word]
    outcome.check(*([] if outcome.sentence == usual else [name, 'nowhere', *words]))

  usual = run().sentence
  for place, flag in enumerate(flags):
    name = flag['name']
    run(f'--{name}').check()
    run(f'--{name}=1', f'--{name}=1').check()
    for value in values.of_flag(flag)[place % one_of :: one_of]:
      give(name, value)
    values.BRIEF(given(st.just(name), values.text())(give))()


def printable(word: str) -> str:
  """As a sentence has it."""
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in word)


@pytest.mark.parametrize('command', commands())
def test_arguments_that_are_no_flags(server, command):
  for line in (['x', 'y', 'z'], ['--nowhere=1'], ['--=1'], ['-'], [''], ['--json'], []):
    server.run(command, *line).check()
