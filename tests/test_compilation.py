"""The compilation cache, by processes that compile the same step after one another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import jax, jax.numpy as jnp
from bam_jax import cli
cli.use_cache()
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
def loss(w, x):
  return jnp.sum(jax.nn.silu(x @ w) ** 3)
step = jax.jit(jax.value_and_grad(loss))
value, grad = step(jnp.linspace(-1, 1, 64 * 96).reshape(64, 96), jnp.ones((32, 64)) / 7)
print(value, bytes(grad).hex())
"""


@pytest.mark.slow
def test_what_is_loaded_is_what_was_compiled(tmp_path):
  def run(**environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith('JAX_')}
    done = subprocess.run(
      [sys.executable, '-c', PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True,
      env=clean | {'JAX_PLATFORMS': 'cpu', 'XDG_CACHE_HOME': str(tmp_path)} | environment,
    )  # fmt: skip
    assert not done.stderr, 'nothing may be warned of'
    return done.stdout, sorted(tmp_path.rglob('*-cache'))

  never, files = run(JAX_ENABLE_COMPILATION_CACHE='false')
  assert files == []
  (tmp_path / 'file').write_text('')
  assert run(XDG_CACHE_HOME=str(tmp_path / 'file')) == (never, []), 'a home that is read-only'
  first, files = run()
  assert files and {file.parent.parent for file in files} == {tmp_path / 'bam_jax'}
  times = [file.stat().st_mtime_ns for file in files]
  assert run() == (first, files) and first == never
  assert [file.stat().st_mtime_ns for file in files] == times  # read, not written
  _, files = run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'mine'))
  assert any(file.parent == tmp_path / 'mine' for file in files)
