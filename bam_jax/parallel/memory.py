"""How much memory there is, so that what cannot fit is refused before it is tried."""

from pathlib import Path

import jax


def free_bytes() -> int | None:
  """Memory that a device has left, or this machine if that is the device; None if unknown."""
  device = jax.local_devices()[0]
  if device.platform == 'cpu':
    return _available_bytes()
  stats = device.memory_stats() or {}
  if 'bytes_limit' not in stats:
    return None
  return stats['bytes_limit'] - stats.get('bytes_in_use', 0)


def _available_bytes() -> int | None:
  """What Linux could give to a process; elsewhere None."""
  try:
    lines = Path('/proc/meminfo').read_text(encoding='ascii').splitlines()
  except OSError:
    return None
  found = [line for line in lines if line.startswith('MemAvailable:')]
  return 1024 * int(found[0].split()[1]) if found else None
