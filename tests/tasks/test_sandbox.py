"""Real programs that go past each limit."""

import os
import sys
import time

import pytest

from bam_jax.errors import UserError
from bam_jax.tasks import launcher, sandbox

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='the limits are of Linux')


def ended(program: str, **limits) -> sandbox.Result:
  return sandbox.run(program, **limits)


@pytest.mark.parametrize('program', [
  'assert 1 + 1 == 2',
  'import math, re, collections, typing, itertools, hashlib, json, heapq, datetime, decimal',
  'class A: pass\ndef f(): return A()\nassert isinstance(f(), A)',
  'open("here", "w").write("x" * 1000)\nassert open("here").read() == "x" * 1000',
  'x = bytearray(2**26)',
  'print("x" * 10**7)',
])  # fmt: skip
def test_harmless_programs_pass(program):
  assert ended(program) == (True, '')


@pytest.mark.parametrize('program, why', [
  ('assert 1 + 1 == 3', 'AssertionError'),
  ('def f(', 'SyntaxError'),
  ('\0', ''),
  ('x = "\ud800\udcff"', ''),
  ('import sys; sys.exit(0)', ''),  # it must get to its end
  ('import os; os._exit(0)', ''),
  ('raise KeyboardInterrupt', 'KeyboardInterrupt'),
  ('import os; os.abort()', ''),
  ('def f(): return f()\nf()', 'RecursionError'),
])  # fmt: skip
def test_what_fails(program, why):
  result = ended(program)
  assert not result.passed and why in result.why and len(result.why) <= sandbox.OUTPUT_BYTES


def test_clock():
  begin = time.monotonic()
  assert ended('import time; time.sleep(100)', seconds=0.5) == (False, 'time')
  assert time.monotonic() - begin < 30


def test_processor():
  assert ended('while True: pass', cpu_seconds=1, seconds=60) == (False, 'time')
  ignoring = 'import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass'
  assert not ended(ignoring, cpu_seconds=1, seconds=60).passed


def test_memory():
  assert 'MemoryError' in ended('x = bytearray(2**31)').why


def test_files():
  much = 'file = open("x", "wb", 0)\nfile.write(bytes(2**21))\nfile.write(b"x")'
  assert 'OSError' in ended(much).why
  assert not ended('import sys\nsys.stderr.write("x" * 2**22)\nsys.stderr.flush()').passed


@pytest.mark.parametrize('program', [
  'import os; os.fork()',
  'import subprocess; subprocess.run(["true"])',
  'import os; os.posix_spawn("/bin/true", ["true"], {})',
  'import _thread; _thread.start_new_thread(print, ())',
  'import socket; socket.socket()',
  'import os; os.kill(os.getppid(), 0)',
  'import os; os.setsid()',
  'import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))',
])  # fmt: skip
def test_calls_that_are_refused(program):
  result = ended(program)
  assert not result.passed
  assert any(
    word in result.why for word in ('PermissionError', "can't start new thread", 'not allowed')
  )


def test_it_finds_nothing(monkeypatch):
  monkeypatch.setenv('SECRET', 'x')
  assert ended('import os; assert not os.listdir()').passed
  assert ended('import os; assert set(os.environ) <= {"LC_CTYPE"}, os.environ').passed
  assert ended('import sys; assert not sys.stdin.read() and len(sys.argv) == 1').passed
  assert not ended('import numpy').passed


def test_nothing_stays_behind(tmp_path, monkeypatch):
  monkeypatch.setattr(sandbox.tempfile, 'tempdir', str(tmp_path))
  before = os.listdir('/proc/self/fd')
  ended('open("x", "w").write("x")')
  ended('import time; time.sleep(100)', seconds=0.3)
  assert not list(tmp_path.iterdir())
  assert len(os.listdir('/proc/self/fd')) == len(before)


def test_a_machine_without_limits_runs_nothing(tmp_path, monkeypatch):
  odd = tmp_path / 'launcher.py'
  text = open(launcher.__file__, encoding='utf-8').read()
  odd.write_text(text.replace("sys.platform != 'linux'", "sys.platform != 'plan9'"))
  monkeypatch.setattr(sandbox, 'LAUNCHER', str(odd))
  assert not ended(f'open("{tmp_path}/ran", "w")').passed
  assert not (tmp_path / 'ran').exists()
  with pytest.raises(UserError, match='--allow_generated_code needs limits'):
    sandbox.require()
