"""What every command line shares: flags in, exit status and one table or one JSON object out."""

import contextlib
import importlib
import json
import math
import os
import select
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import rich.console
import rich.progress
from absl import app, flags, logging
from ml_collections import config_flags

from bam_jax import config, errors
from bam_jax.config import recipe_file
from bam_jax.errors import UserError
from bam_jax.parallel import compilation, sharding

MOST_CHARACTERS = 2000  # of a sentence, which may repeat what the user typed

_JSON = flags.DEFINE_string(
  'json', None, 'Also write the facts as one JSON object to this file; "-" is standard output.'
)


def run(
  main: Callable[..., dict[str, Any] | None],
  max_arguments: int = 0,
  verbosity: int = logging.ERROR,
) -> None:
  """Parses the flags, calls `main`, and writes what it returns where `--json` says.

  Args:
    main: the command; returns the facts of its `--json` object, or None. Raises UserError for a
      user's mistake.
    max_arguments: how many arguments that are no flags it takes; `main` is called with them.
    verbosity: what libraries may log, without --verbosity: Orbax warns of what is no trouble.
  """

  def guarded(argv: Sequence[str]) -> int:
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(verbosity)
    try:
      if len(argv) > 1 + max_arguments:
        argument = argv[1 + max_arguments]
        raise UserError(f'Unexpected argument {argument!r}: every option is a --flag=value.')
      if _JSON.value:
        check_json(_JSON.value)
      compilation.use_cache()
      facts = main(*argv[1:])
      if _JSON.value and facts is not None:
        write_json(_JSON.value, facts)
    except Exception as error:
      if not (said := errors.sentence(error)):
        raise
      return _refuse(said)
    return 0

  try:
    app.run(guarded, flags_parser=_parse)
  except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # another one may hit what Python does at its exit
    sys.exit(_refuse('interrupted.', 128 + signal.SIGINT))
  except BrokenPipeError:
    unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    if not unread:
      raise  # by a pipe of our own
    for stream in unread:
      _leave(stream)
    sys.exit(128 + signal.SIGPIPE)  # what a shell has of a program that did not ignore the signal


def run_subcommands(subcommands: Mapping[str, str]) -> None:
  """Runs the subcommand that the first argument names.

  Args:
    subcommands: the module of each, imported only when it runs; it has flags,
      `main`, a docstring for `--help`, and, if `main` takes arguments, MAX_ARGUMENTS.
  """
  name = sys.argv[1] if len(sys.argv) > 1 else ''
  if name.lstrip('-') in ('help', 'helpfull', 'helpshort', 'h', '?'):
    print(sys.modules['__main__'].__doc__)
    sys.exit(0)
  if name not in subcommands:
    problem = f'{name!r} is not a subcommand' if name else 'A subcommand is required'
    sys.exit(_refuse(f'{problem}: give one of {", ".join(subcommands)}. (Try --help.)'))
  module = importlib.import_module(subcommands[name])
  errors.subcommand = name
  del sys.argv[1]
  if {'--help', '-help', '-h'} & set(sys.argv):
    print(module.__doc__)
    print(flags.FLAGS.module_help(module), flags.FLAGS.module_help(__name__), sep='\n')
    sys.exit(0)
  # Orbax logs a traceback of every error that a subcommand reports in a sentence.
  run(module.main, getattr(module, 'MAX_ARGUMENTS', 0), logging.FATAL)


def define_recipe() -> flags.FlagHolder:
  """Defines --config=FILE.py[:ARGUMENT] and --config.KEY=VALUE."""
  return config_flags.DEFINE_config_file('config', None, 'The recipe; FILE.py or FILE.py:ARGUMENT.')


def read_recipe(flag: flags.FlagHolder) -> config.Recipe:
  """The recipe that the flag of `define_recipe` names, checked."""
  if not flag.present:
    raise UserError('Which recipe? Give --config=FILE.py.')
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  try:
    plain = flag.value.to_dict()  # a config file that is not there is noticed only here
  except OSError as error:
    path = name.partition(':')[0]
    if os.path.isfile(path):
      raise UserError(recipe_file.blame([path], error)) from None
    raise UserError(f'--config={name} cannot be read: name a recipe, FILE.py.') from None
  except AttributeError:
    raise UserError(
      f'get_config of --config={name} returns a {type(flag.value).__name__} where a ConfigDict is '
      'wanted: end it with "return config.complete(...)".'
    ) from None
  return config.parse(plain)


@contextlib.contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[int, int], None]]:
  """A progress bar on standard error; yields the function that is told bytes done and in all."""
  columns = (
    rich.progress.TextColumn('{task.description}', markup=False),
    rich.progress.BarColumn(),
    rich.progress.DownloadColumn(),
    rich.progress.TransferSpeedColumn(),
    rich.progress.TimeRemainingColumn(),
  )
  bar = rich.progress.Progress(*columns, console=rich.console.Console(stderr=True))
  task = bar.add_task(what, total=None)

  def show(done: int, total: int) -> None:
    bar.start()  # not before: what is refused at once shows no bar
    bar.update(task, completed=done, total=total)

  try:
    yield show
  finally:
    if bar.live.is_started:
      bar.stop()


def parse_mesh(items: Sequence[str]) -> config.Mesh:
  """The mesh that `--mesh=data=2,expert=4` describes."""
  sizes: dict[str, int] = {}
  for item in items:
    axis, _, size = item.partition('=')
    number = size.isascii() and size.isdecimal() and len(size) < 20
    if axis not in sharding.AXES or not number or axis in sizes:
      raise UserError(f'--mesh={item} is none of {", ".join(f"{a}=N" for a in sharding.AXES)}.')
    sizes[axis] = int(size)
  return config.Mesh(**sizes)


def command() -> str:
  """The whole command line, for a record of what made something."""
  return f'python -m {errors.program_name()} {shlex.join(sys.argv[1:])}'


def check_json(path: str) -> None:
  """Raises UserError where `write_json` could not write, before hours of work."""
  if path == '-':
    return
  link = os.path.islink(path)  # one to nothing is a file to be made
  whole = os.path.realpath(path) if link else os.path.abspath(path)
  there = whole
  while not os.path.exists(there):
    there = os.path.dirname(there)
  folder = there != whole
  if folder and path.endswith(os.sep) or os.path.isdir(there) and not folder:
    reason = 'that is a folder'
  elif folder and not os.path.isdir(there):
    reason = f'{there} is no folder'
  elif not os.access(there, os.W_OK):
    reason = f'{there} is read-only'
  elif link and folder and there != os.path.dirname(whole):
    reason = f'it is a link to {whole}, whose folder is not there'
  elif not (reason := _refused_name(there, whole)):
    return
  raise UserError(f'--json={path} cannot be written: {reason}.')


def _refused_name(there: str, whole: str) -> str | None:
  """What the file system has against a name that is to be made in `there`, or a path so long."""
  parts = whole[len(there) :].split(os.sep)
  for path in (*(os.path.join(there, part) for part in parts if part), whole):
    try:
      os.stat(path)
    except FileNotFoundError:
      pass
    except OSError as error:
      return error.strerror
    except ValueError as error:  # it has a null
      return str(error)
  return None


def write_json(path: str, facts: dict[str, Any]) -> None:
  """Writes one JSON object to `path`, whose folder is made, or to standard output if it is "-"."""
  text = json.dumps(facts, indent=1, sort_keys=True) + '\n'
  try:
    if path == '-':
      sys.stdout.write(text)
      sys.stdout.flush()
      return
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, 'w', encoding='utf-8') as file:
      file.write(text)
  except OSError as error:
    if path == '-' and isinstance(error, BrokenPipeError):
      raise
    if path == '-':
      _leave(sys.stdout)
    raise UserError(f'--json={path} cannot be written: {error.strerror}.') from error


def _parse(argv: Sequence[str]) -> list[str]:
  recipes = recipe_file.paths_of(argv)
  try:
    _check_encoding(argv)
    for recipe in recipes:
      recipe_file.check(recipe)
    arguments = flags.FLAGS(argv)
    _check_numbers()
    return arguments
  except UserError as error:
    sentence = str(error)
  except Exception as error:
    # Of what a recipe raises the library quotes the whole traceback.
    if isinstance(error, flags.Error | OSError | ValueError) and 'Traceback' not in str(error):
      sentence = ' '.join(str(error).split())
    elif recipes:
      sentence = recipe_file.blame(recipes, error)
    else:
      raise
  sys.exit(_refuse(f'{sentence} (Try --help.)'))


def _check_encoding(argv: Sequence[str]) -> None:
  """UserError for an argument that is not UTF-8; files and records could not name it."""
  for argument in argv:
    try:
      argument.encode()
    except UnicodeEncodeError:
      raise UserError(
        f'{ascii(argument)[:80]} on the command line is not UTF-8: convert it.'
      ) from None


def _check_numbers() -> None:
  """UserError for a number that the libraries cannot hold."""
  for name in flags.FLAGS:
    value = flags.FLAGS[name].value
    if type(value) is int and not -(2**63) <= value < 2**63:
      raise UserError(f'--{name} is past 64 bits: choose a smaller number.')
    if type(value) is float and not math.isfinite(value):
      raise UserError(f'--{name}={value} is not finite: give a number.')


def _is_unread(stream: TextIO) -> bool:
  """Whether a stream is a pipe whose reader has left."""
  poll = select.poll()
  poll.register(stream.fileno(), 0)
  return any(events & select.POLLERR for _, events in poll.poll(0))


def _leave(stream: TextIO) -> None:
  """Lets what could not be written go nowhere: Python tries again at its exit, and complains."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _refuse(sentence: str, status: int = errors.USER_ERROR) -> int:
  """Prints a sentence in one line that cannot move the cursor; the status to exit with."""
  shown = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence)
  if len(shown) > MOST_CHARACTERS:
    half = MOST_CHARACTERS // 2
    shown = f'{shown[:half]} ... {shown[-half:]}'
  print(f'{errors.program_name()}: {shown}', file=sys.stderr)
  return status
