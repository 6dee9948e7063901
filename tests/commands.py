"""Commands by the hundred: a process that has imported everything forks a child for each.

    python -m tests.commands < requests.jsonl

A request is {'module', 'argv', 'folder', 'seconds', 'list'}: the child does what
`python -m MODULE ARGV` does in that folder, or, with `list`, tells the module's flags. The answer
is a line of JSON too: see `Outcome`. JAX has been imported and not asked for its devices, so that a
child starts no later than at the first line of the module, in milliseconds and not in seconds.

A child may not take more than MEMORY_BYTES of address space beyond what it starts with, whatever it
is asked for, nor more than `seconds`.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NamedTuple, Self

import bam_jax

ROOT = Path(bam_jax.__file__).parent.parent
MEMORY_BYTES = 6 * 2**30  # of addresses, of which most stay empty
RESIDENT_BYTES = 2**30  # that bad input may fill, those of the libraries included
SECONDS = 120
MOST_CHARACTERS = 2100  # of a sentence


class Outcome(NamedTuple):
  """How a command ended."""

  argv: list[str]
  status: int  # negative: the signal that ended it
  stdout: str
  stderr: str
  resident: int  # bytes of memory at most, those of the libraries included

  @property
  def sentence(self) -> str:
    """The last line that it wrote to standard error."""
    return (self.stderr.strip().splitlines() or [''])[-1]

  def check(self, *names: str, most: int = RESIDENT_BYTES) -> Self:
    """Asserts that it did what was asked or refused it in a sentence that has one of `names`.

    Args:
      names: words one of which the sentence must have; none asks for nothing.
      most: bytes of memory that it may fill.
    """
    shown = f'{ascii(self.argv)[:500]}: status {self.status}\n{self.stderr[-3000:]}'
    assert 'Traceback' not in self.stderr + self.stdout, shown
    assert self.status in (0, 2), shown
    assert self.resident <= most, f'{self.resident >> 20} MiB; {shown}'
    if self.status == 2:
      told = [line for line in self.stderr.splitlines() if line.startswith('bam_jax.')]
      assert told == [self.sentence], shown
      assert re.fullmatch(r'bam_jax\.\w+( [\w-]+)?: .+[.?!)]', self.sentence), shown
      assert self.sentence.isprintable() and len(self.sentence) <= MOST_CHARACTERS, shown
      assert not names or any(name in self.sentence for name in names), shown
    return self

  def refused(self, words: str) -> None:
    """Asserts that all it did was to refuse, in one line that has these words."""
    assert self.status == 2 and words in self.stderr, self.stderr
    assert len(self.stderr.strip().splitlines()) == 1 and not self.stdout


class Server:
  """The process, from the side of those who ask; a context manager."""

  def __init__(self, folder: Path):
    """Takes the folder where commands run, unless they say another."""
    self._folder = folder

  def __enter__(self) -> Self:
    kept = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_NUM_CPU_DEVICES')}
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'tests.commands'],
      cwd=ROOT, env=kept | {'JAX_PLATFORMS': 'cpu', 'COLUMNS': '100'}, text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    return self

  def __exit__(self, *error) -> None:
    self._process.stdin.close()
    self._process.wait()

  def run(
    self, module: str, *argv: str, folder: Path | None = None, seconds: int = SECONDS
  ) -> Outcome:
    """What `python -m bam_jax.MODULE ARGV` does; MODULE may be 'convert SUBCOMMAND'."""
    module, *subcommand = module.split()
    return Outcome(**self._ask(module, [*subcommand, *argv], folder, seconds))

  def flags(self, module: str) -> list[dict[str, Any]]:
    """`name`, `type`, `multiple`, `default` of all flags that a command or subcommand has."""
    module, *subcommand = module.split()
    outcome = Outcome(**self._ask(module, subcommand, None, SECONDS, list=True))
    assert outcome.status == 0, outcome.stderr
    return json.loads(outcome.stdout)

  def _ask(self, module: str, argv: list[str], folder: Path | None, seconds: int, **more) -> dict:
    request = dict(module=f'bam_jax.{module}', argv=argv, seconds=seconds, **more)
    request['folder'] = str(folder or self._folder)
    self._process.stdin.write(json.dumps(request) + '\n')
    self._process.stdin.flush()
    return json.loads(self._process.stdout.readline())


def commands() -> list[str]:
  """All commands of the package, the subcommands of those that have some one by one."""
  found = []
  root = Path(bam_jax.__file__).parent
  for path in sorted([*root.glob('*.py'), *root.glob('*/__main__.py')]):
    if "__name__ == '__main__'" in path.read_text(encoding='utf-8') and 'tasks' not in path.parts:
      name = path.stem if path.parent == root else path.parent.name
      subcommands = []
      if 'SUBCOMMANDS' in path.read_text(encoding='utf-8'):
        subcommands = importlib.import_module('bam_jax.convert.__main__').SUBCOMMANDS
      found += [f'{name} {subcommand}' for subcommand in subcommands] or [name]
  return found


def main() -> None:
  """Answers requests until there are no more."""
  for module in pkgutil.walk_packages(bam_jax.__path__, 'bam_jax.'):
    with contextlib.suppress(ImportError):  # what a command needs torch for
      if not _defines_flags(module):
        importlib.import_module(module.name)
  answers = os.fdopen(os.dup(1), 'w')
  mapped = resource.getpagesize() * int(Path('/proc/self/statm').read_text().split()[0])
  for line in sys.stdin:
    request = json.loads(line)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
      child = os.fork()
      if not child:
        _run(request, mapped + MEMORY_BYTES, out.fileno(), err.fileno())
      _, status, usage = os.wait4(child, 0)
      outcome = Outcome(
        argv=request['argv'],
        status=os.waitstatus_to_exitcode(status),
        stdout=_text(out),
        stderr=_text(err),
        resident=1024 * usage.ru_maxrss,
      )
    print(json.dumps(outcome._asdict()), file=answers, flush=True)


def _defines_flags(module: pkgutil.ModuleInfo) -> bool:
  """Whether importing it would claim names of flags, which commands share."""
  source = module.module_finder.find_spec(module.name).loader.get_source(module.name)
  is_command = "__name__ == '__main__'" in source
  return is_command or '= flags.DEFINE' in source and module.name != 'bam_jax.cli'


def _text(file) -> str:
  file.seek(0)
  return file.read().decode('utf-8', 'surrogateescape')


def _run(request: dict[str, Any], most_bytes: int, out: int, err: int) -> None:
  os.dup2(out, 1)
  os.dup2(err, 2)
  os.chdir(request['folder'])
  resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  signal.alarm(request['seconds'])
  status = 1
  try:
    if request.get('list'):
      _list(request['module'], request['argv'])
    else:
      sys.argv = ['', *request['argv']]
      runpy.run_module(request['module'], run_name='__main__', alter_sys=True)
    status = 0
  except SystemExit as end:
    status = end.code if isinstance(end.code, int) else 1 if end.code else 0
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _list(name: str, subcommand: list[str]) -> None:
  package = importlib.util.find_spec(name).submodule_search_locations is not None
  module = importlib.import_module(f'{name}.__main__' if package else name)
  if subcommand:
    importlib.import_module(module.SUBCOMMANDS[subcommand[0]])
  from absl import flags

  print(
    json.dumps(
      [
        dict(
          name=flag.name, type=flag.flag_type(), default=flag.default_unparsed,
          multiple=isinstance(flag, flags.MultiFlag),
        )
        for owner, owned in flags.FLAGS.flags_by_module_dict().items()
        if owner.startswith('bam_jax.')
        for flag in owned
      ],
      default=str,
    )
  )  # fmt: skip


if __name__ == '__main__':
  main()
