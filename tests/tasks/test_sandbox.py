"""Real programs that exceed each limit, and the scores of programs."""

import os
import sys
import time

import pytest

from bam_jax.errors import UserError
from bam_jax.tasks import sandbox, scoring

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='the limits are of Linux')


@pytest.mark.parametrize('program', [
  'import math, re, collections, typing, itertools, hashlib, json, heapq, datetime, decimal',
  'open("here", "w").write("x" * 1000)\nassert open("here").read() == "x" * 1000',
  'x = bytearray(2**26)\nprint("x" * 10**7)',
])  # fmt: skip
def test_harmless_programs_pass(program):
  assert sandbox.run(program) == ''


@pytest.mark.parametrize('program, reason', [
  ('assert 1 + 1 == 3', 'AssertionError'),
  ('def f(', 'SyntaxError'),
  ('x = "\ud800\udcff"', ''),
  ('import sys; sys.exit(0)', ''),  # it must reach its end
  ('import os; os._exit(0)', ''),
  ('x = bytearray(2**31)', 'MemoryError'),
  ('file = open("x", "wb", 0)\nfile.write(bytes(2**21))\nfile.write(b"x")', 'OSError'),
  ('import sys\nsys.stderr.write("x" * 2**22)\nsys.stderr.flush()', ''),
])  # fmt: skip
def test_what_fails(program, reason):
  failure = sandbox.run(program)
  assert failure and reason in failure and len(failure) <= sandbox.OUTPUT_BYTES


def test_time(monkeypatch):
  monkeypatch.setattr(sandbox, 'SECONDS', 0.5)
  begin = time.monotonic()
  assert sandbox.run('import time; time.sleep(100)') == 'time'
  assert time.monotonic() - begin < 30
  monkeypatch.setattr(sandbox, 'SECONDS', 60)
  monkeypatch.setitem(sandbox.LIMITS, sandbox.resource.RLIMIT_CPU, 1)
  assert sandbox.run('while True: pass') == 'time'


@pytest.mark.skipif(os.geteuid() != 0, reason='only programs of root can start others')
@pytest.mark.parametrize('end, failure', [('', ''), ('time.sleep(100)', 'time')])
def test_what_a_program_starts_ends_with_it(tmp_path, monkeypatch, end, failure):
  monkeypatch.setattr(sandbox, 'SECONDS', 5)
  begin, pipe = time.monotonic(), tmp_path / 'pipe'
  os.mkfifo(pipe)
  alive = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
  program = f'import os, time\npipe = open("{pipe}", "w")\nif not os.fork(): time.sleep(100)\n{end}'
  assert sandbox.run(program) == failure
  os.set_blocking(alive, True)
  assert os.read(alive, 1) == b''  # when nobody has the other end open
  os.close(alive)
  assert time.monotonic() - begin < 30


def test_it_finds_nothing(monkeypatch):
  monkeypatch.setenv('SECRET', 'x')
  failure = sandbox.run(
    'import os, sys; assert not os.listdir() and set(os.environ) <= {"LC_CTYPE"}\n'
    'assert not sys.stdin.read() and len(sys.argv) == 1'
  )
  assert failure == ''
  assert 'ModuleNotFoundError' in sandbox.run('import numpy')


def test_nothing_stays_behind(tmp_path, monkeypatch):
  monkeypatch.setattr(sandbox.tempfile, 'tempdir', str(tmp_path))
  before = os.listdir('/proc/self/fd')
  sandbox.run('open("x", "w").write("x")')
  monkeypatch.setattr(sandbox, 'SECONDS', 0.3)
  sandbox.run('import time; time.sleep(100)')
  assert not list(tmp_path.iterdir()) and len(os.listdir('/proc/self/fd')) == len(before)


def test_a_machine_without_limits_runs_nothing(tmp_path, monkeypatch):
  monkeypatch.delattr(sandbox.resource, 'prlimit')
  assert sandbox.run(f'open("{tmp_path}/ran", "w")')
  assert not (tmp_path / 'ran').exists()
  with pytest.raises(UserError, match='--allow_generated_code requires limits'):
    sandbox.require()


DOC = {
  'prompt': 'def add(a, b):\n',
  'test': 'def check(candidate):\n  assert candidate(1, 2) == 3\n',
  'entry_point': 'add',
}
MBPP = {'test_setup_code': 'z = 1', 'test_list': ['assert f(z) == 2', 'assert f(2) == 3']}


@pytest.mark.parametrize('score, doc, text, passed', [
  (scoring.human_eval, DOC, '  return a + b', 1.0), (scoring.human_eval, DOC, '', 0.0),
  (scoring.human_eval, DOC, '  return a - b', 0.0),
  (scoring.human_eval, DOC, '  raise SystemExit(0)', 0.0),
  (scoring.mbpp, MBPP, 'def f(x):\r\n  return x + 1', 1.0),
  (scoring.mbpp, MBPP, 'def f(x): return 2', 0.0),
  (scoring.mbpp, MBPP, 'import os\nf = os._exit', 0.0),
  (scoring.mbpp, {'test_setup_code': None, 'test_list': []}, 'import os', 1.0),
])  # fmt: skip
def test_pass_at_1(score, doc, text, passed):
  assert score(doc, [text]) == {'pass_at_1': passed}
