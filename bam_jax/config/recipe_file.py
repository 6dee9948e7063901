"""The file that `--config` names: Python code, which runs while the flags are parsed.

What it raises is told by its own line: a traceback would show the library between.
"""

import itertools
import os
import traceback
from collections.abc import Sequence

from bam_jax.errors import UserError


def paths_of(argv: Sequence[str]) -> list[str]:
  """FILE of every `--config=FILE:ARGUMENT` on a command line; each of them is run."""
  found = []
  for argument, following in itertools.pairwise([*argv, '']):
    name, equals, value = argument.partition('=')
    if name in ('-config', '--config'):
      found.append((value if equals else following).partition(':')[0])
  return found


def check(path: str) -> None:
  """UserError for what is there and no file: a device would be read for ever."""
  if os.path.exists(path) and not os.path.isfile(path):
    raise UserError(f'--config={path} is no file: name a recipe, FILE.py.')


def blame(paths: Sequence[str], error: BaseException) -> str:
  """A sentence about an error of recipes, or of flags that set their keys: where it began.

  Args:
    paths: of the recipes.
    error: what was raised while they were read.
  """
  chain = [error]
  while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
    chain.append(before)
  for one in chain:
    if isinstance(one, SyntaxError) and one.filename in paths:
      return f'{one.filename}, line {one.lineno}, is no Python: {one.msg}.'
    for frame, line in reversed(list(traceback.walk_tb(one.__traceback__))):
      if frame.f_code.co_filename in paths:
        return f'{frame.f_code.co_filename}, line {line}, raises {type(one).__name__}: {one}.'
  first = chain[-1]
  if 'get_config' in str(first) or not isinstance(first, AttributeError | KeyError):
    return f'--config={paths[-1]} is no recipe, which has a function get_config: {first}.'
  return f'a --config.KEY flag names no key of the recipe: {first.args[0]}.'
