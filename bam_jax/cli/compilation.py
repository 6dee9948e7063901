"""The persistent compilation cache: programs compiled once on a machine are loaded afterwards.

On by default. JAX's own variables `JAX_COMPILATION_CACHE_DIR` and
`JAX_ENABLE_COMPILATION_CACHE=false` move it and turn it off.
"""

import os
import warnings
from pathlib import Path

import jax

MAX_BYTES = 4 * 2**30  # the least recently used are evicted first
MIN_SECONDS = 0.5  # minimum compilation time for an entry


def use_cache() -> None:
  """Sets JAX's cache before anything is compiled; keeps one that the user has set."""
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    folder = Path(home, 'bam_jax', 'compiled')  # JAX's keys have the processor and its features
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_compilation_cache_max_size', MAX_BYTES)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', MIN_SECONDS)
  # A home may be read-only, and a full disk or a kill leave a truncated file: JAX then compiles
  # anew, with a warning each time.
  warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache entry')
