"""The persistent compilation cache: programs compiled once on a machine are loaded afterwards.

On by default. JAX's own variables `JAX_COMPILATION_CACHE_DIR` and
`JAX_ENABLE_COMPILATION_CACHE=false` move it and turn it off.
"""

import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax

MAX_BYTES = 4 * 2**30  # the least recently used are evicted first
MIN_SECONDS = 0.5  # minimum compilation time for an entry


def use_cache() -> None:
  """Sets JAX's cache before anything is compiled; keeps one that the user has set."""
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    folder = cache_folder()
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError:
      return  # a read-only home: compile every time
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_compilation_cache_max_size', MAX_BYTES)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', MIN_SECONDS)
  # A full disk or a kill may leave a truncated file; JAX then recompiles, with a warning each time.
  warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache entry')


def cache_folder() -> Path:
  """This machine's folder in the user's cache.

  CPU code depends on CPU features and the C library, which are not in JAX's key, and a home folder
  may be shared: machines that differ in them do not share files.
  """
  home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  facts = ' '.join([platform.machine(), *platform.libc_ver(), _cpu_features()])
  machine = f'{platform.machine()}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}'
  return Path(home) / 'bam_jax' / machine


def _cpu_features() -> str:
  """The CPU flags that Linux reports; the processor's name elsewhere."""
  try:
    lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
  except OSError:
    return platform.processor()
  wanted = ('model name', 'flags', 'Features', 'CPU implementer', 'CPU part')
  return ' '.join(sorted({line for line in lines if line.startswith(wanted)}))
