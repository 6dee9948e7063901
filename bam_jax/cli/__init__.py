"""What every command shares: flags in; an exit status and a table or a JSON object out."""

import contextlib
import importlib
import json
import math
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import rich.console
import rich.table
from absl import app, flags, logging
from ml_collections import config_flags
from rich import progress

from bam_jax import config, errors
from bam_jax.cli import recipe_file
from bam_jax.config.strict import require
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.parallel import sharding

CACHE_BYTES = 4 * 2**30  # of compiled programs: the least recently used are evicted first
CACHE_SECONDS = 0.5  # minimum compilation time of a program in the cache

_JSON = flags.DEFINE_string('json', None, 'File for the results as one JSON object; "-": stdout.')


def run(main: Callable[..., dict[str, Any] | None], max_arguments: int = 0) -> None:
  """Parses the flags, calls `main(*arguments)`, and writes what it returns where `--json` says."""

  def guarded(argv: Sequence[str]) -> int | None:
    if not flags.FLAGS['verbosity'].present:  # Orbax logs a traceback of what is reported below
      logging.set_verbosity(logging.FATAL)
    try:
      for argument in argv[1 + max_arguments :]:
        raise UserError(f'Unexpected argument {argument!r}: write options as --flag=value.')
      check_json(_JSON.value or '-')
      use_cache()
      facts = main(*argv[1:])
      if _JSON.value and facts is not None:
        write_json(_JSON.value, facts)
    except Exception as error:
      if message := errors.sentence(error):
        return _refuse(message)
      raise

  try:
    app.run(guarded, flags_parser=_parse)
  except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's exit must not raise a second one
    sys.exit(_refuse('interrupted.', 128 + signal.SIGINT))
  except BrokenPipeError:  # as in `bam_jax.evaluate ... | head`
    _discard(sys.stdout)
    sys.exit(128 + signal.SIGPIPE)


def run_subcommands(subcommands: Mapping[str, str]) -> None:
  """Runs the subcommand that the first argument names: a module, imported only then.

  It has flags, `main`, a docstring for `--help`, and MAX_ARGUMENTS if `main` takes arguments.
  """
  name = (*sys.argv, '')[1]
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
  run(module.main, getattr(module, 'MAX_ARGUMENTS', 0))


def use_cache() -> None:
  """Programs compiled once on a machine are loaded afterwards, out of JAX's persistent cache.

  Called before anything is compiled. JAX's own variables JAX_COMPILATION_CACHE_DIR and
  JAX_ENABLE_COMPILATION_CACHE=false move the cache and turn it off.
  """
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    folder = Path(home, 'bam_jax', 'compiled')  # JAX's keys have the processor and its features
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_compilation_cache_max_size', CACHE_BYTES)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', CACHE_SECONDS)
  # A home may be read-only, and a full disk or a kill leave a truncated file: JAX then compiles
  # anew, with a warning each time.
  warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache entry')


def define_recipe() -> flags.FlagHolder:
  """Defines --config=FILE.py[:ARGUMENT] and --config.KEY=VALUE."""
  return config_flags.DEFINE_config_file('config', None, 'The recipe; FILE.py or FILE.py:ARGUMENT.')


def read_recipe(flag: flags.FlagHolder) -> config.Recipe:
  """The recipe that the flag of `define_recipe` names, checked."""
  require(flag.present, '--config is required: give --config=FILE.py.')
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  try:
    plain = flag.value.to_dict()  # the library notices only here that the file is missing
  except OSError as error:
    if not os.path.isfile(name.partition(':')[0]):
      raise UserError(f'--config={name} cannot be read: name a recipe, FILE.py.') from None
    raise UserError(recipe_file.explain([f'--config={name}'], error)) from None
  except AttributeError:
    found = f'returns a {type(flag.value).__name__} instead of config.complete(...).'
    raise UserError(f'get_config of --config={name} {found}') from None
  return config.parse(plain)


def console() -> rich.console.Console:
  """Standard error, where tables and remarks go; text is printed as it is, without markup."""
  made = rich.console.Console(stderr=True, markup=False, highlight=False)
  made.width = max(made.width, 0 if made.is_terminal else 140)  # a log has room
  return made


def table(
  title: str | None, left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[Any]]
) -> rich.table.Table:
  """A table for `console()`: `left` names its columns of text, `right` those of numbers."""
  made = rich.table.Table(title=title, title_justify='left', box=None, pad_edge=False)
  for name in (*left, *right):
    made.add_column(name, justify='right' if name in right else 'left', overflow='fold')
  for row in rows:
    made.add_row(*(f'{cell:,}' if isinstance(cell, int) else str(cell) for cell in row))
  return made


@contextlib.contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[int, int], None]]:
  """A progress bar on a terminal; yields the function to call with bytes done and in all."""
  text = progress.TextColumn('{task.description}', markup=False)
  columns = text, progress.BarColumn(), progress.DownloadColumn(), progress.TimeRemainingColumn()
  shown = console()
  # Gone when it ends: a command that refuses its input leaves nothing but the reason.
  bar = progress.Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal)
  with bar:
    task = bar.add_task(what, total=None)
    yield lambda done, total: bar.update(task, completed=done, total=total)


def parse_mesh(items: Sequence[str]) -> config.Mesh:
  """The mesh that `--mesh=data=2,expert=4` describes."""
  sizes: dict[str, int] = {}
  for item in items:
    match = re.fullmatch(rf'({"|".join(sharding.AXES)})=([0-9]{{1,19}})', item)
    known = ', '.join(f'{axis}=N' for axis in sharding.AXES)
    require(match and match[1] not in sizes, f'--mesh={item} is not one of {known}.')
    sizes[match[1]] = int(match[2])
  return config.Mesh(**sizes)


def command() -> str:
  """The whole command line, to record what made a file."""
  return f'python -m {errors.program_name()} {shlex.join(sys.argv[1:])}'


def check_json(path: str) -> None:
  """Creates the file of `--json` and its folder: a bad path fails before hours of work."""
  if path != '-':
    with folders.writing(f'--json={path}'):
      with contextlib.suppress(FileExistsError):
        os.makedirs(os.path.dirname(os.path.abspath(path)))
      open(path, 'ab').close()


def write_json(path: str, facts: dict[str, Any]) -> None:
  """Writes one JSON object to `path`, or to standard output if it is "-"."""
  text = json.dumps(facts, indent=1, sort_keys=True) + '\n'
  if path != '-':
    with folders.writing(f'--json={path}'):
      Path(path).write_text(text, encoding='utf-8')
    return
  try:
    print(text, end='', flush=True)
  except BrokenPipeError:
    raise
  except OSError as error:
    _discard(sys.stdout)
    raise UserError(f'--json=- cannot be written: {error.strerror}.') from error


def _parse(argv: Sequence[str]) -> list[str]:
  """Parses the flags; a mistake in them or in a recipe ends the program."""
  try:
    for argument in argv:
      wrong = any('\ud800' <= character <= '\udfff' for character in argument)
      require(not wrong, f'{ascii(argument)[:80]} on the command line is not UTF-8: convert it.')
    with recipe_file.importable(argv):
      arguments = flags.FLAGS(argv)
    for name, value in flags.FLAGS.flag_values_dict().items():
      bound = 2**63 if type(value) is int else math.inf
      fits = type(value) not in (int, float) or abs(value) < bound
      require(fits, f'--{name} is not a finite 64-bit number: choose another.')
    return arguments
  except Exception as error:
    message = str(error) if isinstance(error, UserError) else recipe_file.explain(argv, error)
    sys.exit(_refuse(f'{message} (Try --help.)'))


def _discard(stream: TextIO) -> None:
  """Discards buffered output, which Python would try to write on exit, and fail."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _refuse(message: str, status: int = errors.USER_ERROR) -> int:
  """Prints a message in one line that cannot move the cursor; returns the exit status."""
  shown = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
  if len(shown) > 2000:  # it repeats what the user typed
    shown = f'{shown[:1000]} ... {shown[-1000:]}'
  print(f'{errors.program_name()}: {shown}', file=sys.stderr)
  return status
