"""The layout holds: imports go down, rooms stay small, and documents name what exists."""

import ast
import functools
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'bam_jax'

# From the ground up: a module may import from its own room and from those before it.
CORE = [
  'errors', 'config', 'files', 'parallel', 'model', 'data', 'checkpoint', 'upcycle', 'train',
  'recipes',
]  # fmt: skip
EXTRAS = [
  'cli', 'prepare', 'reports', 'account', 'generate', 'evaluate', 'hf', 'aot', 'tasks', 'convert',
  'commands',
]  # fmt: skip
FLOORS = [*CORE, *EXTRAS]
MAX_CORE_LINES, MAX_LINES, MAX_TEST_LINES = 8500, 16_725, 18_080
MAX_ENTRIES, MAX_README_LINES = 22, 170


def room_of(path: Path) -> str:
  """The entry of bam_jax that a file lies in; what `python -m` runs is a command."""
  if path.name == '__main__.py' or path == PACKAGE / 'main.py':
    return 'commands'
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


@functools.cache
def imports() -> dict[Path, set[Path]]:
  """The files of bam_jax that each of them imports, inside functions too."""
  found = {}
  for path in sorted(PACKAGE.rglob('*.py')):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        # A name is a module, or something that a module or a package defines.
        names |= {
          name if file_of(name := f'{node.module}.{alias.name}') else node.module
          for alias in node.names
        }
      elif isinstance(node, ast.Import):
        names |= {alias.name for alias in node.names}
    found[path] = {file for name in names if (file := file_of(name))} - {path}
  return found


def file_of(name: str) -> Path | None:
  """The file of a module or package of bam_jax, whose own top is empty and does not count."""
  path = ROOT.joinpath(*name.split('.'))
  candidates = path.with_suffix('.py'), path / '__init__.py'
  found = next((file for file in candidates if file.is_file()), None)
  return found if name.startswith('bam_jax.') else None


def lines(folder: Path, rooms: list[str] | None = None) -> int:
  files = [path for path in folder.rglob('*.py') if rooms is None or room_of(path) in rooms]
  return sum(len(path.read_text(encoding='utf-8').splitlines()) for path in files)


def test_imports_go_down():
  upward = [
    f'{path.relative_to(PACKAGE)} imports {other.relative_to(PACKAGE)}'
    for path, others in imports().items()
    if path != PACKAGE / '__init__.py'
    for other in others
    if FLOORS.index(room_of(other)) > FLOORS.index(room_of(path))
  ]
  assert not upward


def test_no_imports_in_circles():
  # A package's own file may gather its modules, which may import one another.
  graph = {
    path: {other for other in others if other.name != '__init__.py' or other.parent != path.parent}
    for path, others in imports().items()
  }
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_walk_sees_what_it_should():
  block, loop = PACKAGE / 'model' / 'block.py', PACKAGE / 'train' / 'loop.py'
  assert PACKAGE / 'model' / 'attention.py' in imports()[block]
  assert {room_of(path) for path in imports()[loop]} >= {'checkpoint', 'config', 'data'}


def test_rooms_stay_small():
  assert lines(PACKAGE, CORE) <= MAX_CORE_LINES
  assert lines(PACKAGE) <= MAX_LINES
  assert lines(ROOT / 'tests') <= MAX_TEST_LINES
  entries = [path for path in PACKAGE.iterdir() if path.name != '__pycache__']
  assert len(entries) <= MAX_ENTRIES
  assert len((ROOT / 'README.md').read_text(encoding='utf-8').splitlines()) <= MAX_README_LINES


def test_every_test_that_docs_name_exists():
  tests = {path: path.read_text(encoding='utf-8') for path in (ROOT / 'tests').rglob('*.py')}
  text = (ROOT / 'docs' / 'reliability.md').read_text(encoding='utf-8')
  named = re.findall(r'`((?:[\w/]+\.py)?(?:::)?(?:test_\w+)?…?)`', text)
  named = [name for name in named if name.endswith('.py') or '::' in name or 'test_' in name]
  assert len(named) > 40
  missing = []
  for name in named:
    file, _, function = name.rpartition('::') if '::' in name else ('', '', name)
    if name.endswith('.py'):
      file, function = name, ''
    sources = [
      source for path, source in tests.items() if str(path).endswith(f'/{file}' if file else '')
    ]
    if not any(
      f'def {function.removesuffix("…")}' in source if function else True for source in sources
    ):
      missing.append(name)
  assert not missing


@pytest.mark.parametrize(
  'page',
  sorted(path.relative_to(ROOT) for path in [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')]),
  ids=str,
)
def test_links_and_paths_lead_somewhere(page):
  text = (ROOT / page).read_text(encoding='utf-8')
  targets = re.findall(r'\]\(([^)#\s]+)(?:#[\w-]*)?\)', text)
  targets = [target for target in targets if '://' not in target]
  dead = [target for target in targets if not (ROOT / page.parent / target).exists()]
  paths = re.findall(r'`((?:bam_jax|configs|launch|tests|tools|benchmarks)/[\w./-]+)`', text)
  dead += [path for path in paths if not (ROOT / path).exists()]
  assert not dead
