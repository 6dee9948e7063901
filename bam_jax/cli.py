"""What every command line shares: flags in, exit status and one table or one JSON object out."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from bam_jax import config
from bam_jax.errors import UserError

USER_ERROR = 2  # exit status of a user's mistake

_JSON = flags.DEFINE_string(
  'json', None, 'Also write the facts as one JSON object to this file; "-" is standard output.'
)


def run(main: Callable[[], dict[str, Any] | None]) -> None:
  """Parses the flags, calls `main`, and writes what it returns where `--json` says.

  Args:
    main: the command; returns the facts of its `--json` object, or None. Raises UserError for a
      user's mistake.
  """

  def guarded(argv: Sequence[str]) -> int:
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.ERROR)  # Orbax warns of what is no trouble; --verbosity=-1
    try:
      if len(argv) > 1:
        raise UserError(f'Unexpected argument {argv[1]!r}: every option is a --flag=value.')
      facts = main()
      if _JSON.value and facts is not None:
        write_json(_JSON.value, facts)
    except UserError as error:
      print(f'{app_name()}: {error}', file=sys.stderr)
      return USER_ERROR
    return 0

  app.run(guarded, flags_parser=_parse)


def define_recipe() -> flags.FlagHolder:
  """Defines --config=FILE.py[:ARGUMENT] and --config.KEY=VALUE."""
  return config_flags.DEFINE_config_file('config', None, 'The recipe; FILE.py or FILE.py:ARGUMENT.')


def read_recipe(flag: flags.FlagHolder) -> config.Recipe:
  """The recipe that the flag of `define_recipe` names, checked."""
  if flag.value is None:
    raise UserError('Which recipe? Give --config=FILE.py.')
  try:
    plain = flag.value.to_dict()  # a config file that is not there is noticed only here
  except OSError:
    name = config_flags.get_config_filename(flags.FLAGS['config'])
    raise UserError(f'--config={name} cannot be read: name a recipe, FILE.py.') from None
  return config.parse(plain)


def app_name() -> str:
  """The command as the user typed it: `bam_jax.prepare`."""
  return 'bam_jax.' + os.path.splitext(os.path.basename(sys.argv[0]))[0]


def write_json(path: str, facts: dict[str, Any]) -> None:
  """Writes one JSON object to `path`, or to standard output when it is "-"."""
  text = json.dumps(facts, indent=1, sort_keys=True) + '\n'
  if path == '-':
    sys.stdout.write(text)
    return
  try:
    with open(path, 'w', encoding='utf-8') as file:
      file.write(text)
  except OSError as error:
    raise UserError(f'--json={path} cannot be written: {error.strerror}.') from error


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except (flags.Error, UserError, OSError) as error:
    sentence = str(error)
  except (AttributeError, KeyError) as error:
    sentence = f'a --config.KEY flag names no key of the recipe: {error.args[0]}'
  print(f'{app_name()}: {" ".join(sentence.split())} (Try --help.)', file=sys.stderr)
  sys.exit(USER_ERROR)
