"""The file given to `--config`: Python code, which runs while the flags are parsed.

An error in it is reported with the file's own line, instead of a traceback through the library.
"""

import contextlib
import itertools
import os
import sys
import traceback
from collections.abc import Iterator, Sequence

from absl import flags

from bam_jax.config.strict import require


@contextlib.contextmanager
def importable(argv: Sequence[str]) -> Iterator[None]:
  """Lets recipes import modules beside them while they are read, wherever the command runs.

  UserError if `--config` names a folder or a device, which might be read forever.
  """
  before, paths = list(sys.path), _paths(argv)
  for path in paths:
    is_recipe = os.path.isfile(path) or not os.path.exists(path)
    require(is_recipe, f'--config={path} is not a file: name a recipe, FILE.py.')
  sys.path[:0] = [os.path.dirname(os.path.abspath(path)) for path in paths]
  try:
    yield
  finally:
    sys.path[:] = before


def explain(argv: Sequence[str], error: Exception) -> str:
  """A one-line message for an exception while flags were parsed; re-raises bugs."""
  paths, chain = _paths(argv), [error]
  while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
    chain.append(before)
  for one in chain:
    if isinstance(one, SyntaxError) and one.filename in paths:
      return f'{one.filename}, line {one.lineno}, is not valid Python: {one.msg}.'
    for frame, line in reversed(list(traceback.walk_tb(one.__traceback__))):
      if frame.f_code.co_filename in paths:
        return f'{frame.f_code.co_filename}, line {line}, raises {type(one).__name__}: {one}.'
  # The library quotes the whole traceback of unexpected exceptions.
  if isinstance(error, flags.Error | OSError | ValueError) and 'Traceback' not in str(error):
    return ' '.join(str(error).split())
  if not paths:
    raise error
  first = chain[-1]
  if 'get_config' in str(first) or not isinstance(first, AttributeError | KeyError):
    return f'--config={paths[-1]} is not a recipe with a function get_config: {first}.'
  return f'a --config.KEY flag names a key that the recipe does not have: {first.args[0]}.'


def _paths(argv: Sequence[str]) -> list[str]:
  """FILE of every `--config=FILE:ARGUMENT` on a command line; the library runs each of them."""
  found = []
  for argument, following in itertools.pairwise([*argv, '']):
    name, equals, value = argument.partition('=')
    if name in ('-config', '--config'):
      found.append((value if equals else following).partition(':')[0])
  return found
