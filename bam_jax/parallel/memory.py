"""Available memory, so that what cannot fit is refused before it is allocated."""

import re
from pathlib import Path

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
