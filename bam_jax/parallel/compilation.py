"""The persistent compilation cache: what was compiled once on a machine is loaded the next time.

On by default. `JAX_COMPILATION_CACHE_DIR` moves it, `JAX_ENABLE_COMPILATION_CACHE=false` turns it
off: JAX's own variables.
"""

import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax

MAX_BYTES = 4 * 2**30  # the least recently used goes first
MIN_SECONDS = 0.5  # of compilation that is worth a file


def use_cache() -> None:
  """Points JAX at the cache, before anything is compiled; keeps a cache that the user chose."""
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    folder = cache_folder()
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError:
      return  # a read-only home: compile every time
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_compilation_cache_max_size', MAX_BYTES)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', MIN_SECONDS)
  # A full disk or a kill may leave half a file, of which JAX warns in every run: it compiles anew.
  warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache entry')


def cache_folder() -> Path:
  """This machine's folder in the user's cache.

  Code for a CPU depends on its features and on the C library, which JAX's key does not hold, and a
  home folder may be shared: machines that differ in them do not share files.
  """
  home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  facts = ' '.join([platform.machine(), *platform.libc_ver(), _cpu_features()])
  machine = f'{platform.machine()}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}'
  return Path(home) / 'bam_jax' / machine


def _cpu_features() -> str:
  """What Linux says of its processors; the processor's name elsewhere."""
  try:
    lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
  except OSError:
    return platform.processor()
  wanted = ('model name', 'flags', 'Features', 'CPU implementer', 'CPU part')
  return ' '.join(sorted({line for line in lines if line.startswith(wanted)}))
