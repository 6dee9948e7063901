"""Available memory, so that what cannot fit is refused before it is allocated."""

import math
import re
from pathlib import Path
from typing import Any

import jax


def free_bytes() -> int | None:
  """Free memory of a device, or of this machine for CPU devices; None if unknown."""
  device = jax.local_devices()[0]
  if device.platform != 'cpu':
    stats = device.memory_stats() or {}
    limit = stats.get('bytes_limit')
    return limit and limit - stats.get('bytes_in_use', 0)
  try:
    found = re.search(r'MemAvailable: +(\d+)', Path('/proc/meminfo').read_text(encoding='ascii'))
  except OSError:  # not Linux
    return None
  return 1024 * int(found[1]) if found else None


def device_bytes(tree: Any) -> int:
  """Bytes of one device's parts of arrays, given their shapes; whole ones without a sharding."""

  def size(x: jax.ShapeDtypeStruct) -> int:
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return math.prod(shape) * x.dtype.itemsize

  return sum(map(size, jax.tree.leaves(tree)))
