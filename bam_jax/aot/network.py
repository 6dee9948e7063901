"""How long collectives take on a TPU's links, by a simple model of them.

A slice is a grid of chips with a link to each neighbour; long dimensions are rings, others lines. A
group of devices that lies along a dimension sends both ways around a ring, one way's worth along a
line (its ends have one link), and uses all the dimensions it extends over at once. Groups that lie
interleaved on the same line share its links. Between slices everything passes the hosts' network:
what is gathered crosses it once and is spread inside the slice, what is reduced the other way
round. No latency, and no collective disturbs another.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bam_jax.aot.collectives import Collective, sends
from bam_jax.aot.topology import Topology


class Network:
  """The links between the devices of a mesh."""

  def __init__(self, topology: Topology, devices: Sequence[Any]):
    """Takes the mesh's devices in its order, each with `coords`, and `slice_index` if several."""
    self.topology = topology
    dimensions = topology.chip.dimensions
    self.coords = np.array([device.coords[:dimensions] for device in devices])
    self.slices = np.array([getattr(device, 'slice_index', None) or 0 for device in devices])

  def seconds(self, collective: Collective) -> tuple[float, float]:
    """Seconds within slices, and between them; of the slowest group."""
    times = {self._seconds(collective, group) for group in collective.groups}
    return max(inside for inside, _ in times), max(between for _, between in times)

  def _seconds(self, collective: Collective, group: tuple[int, ...]) -> tuple[float, float]:
    members = np.array(group)
    slices, counts = np.unique(self.slices[members], return_counts=True)
    first = members[self.slices[members] == slices[0]]
    inside, between = _split(collective, int(counts[0]), len(slices))
    local = inside / self.bandwidth(first) if inside else 0.0
    return local, between / self.topology.chip.slices_bandwidth

  def bandwidth(self, members: np.ndarray) -> float:
    """Bytes a second that each of a slice's devices can send to the others, all together."""
    total = 0.0
    for places, size in zip(self.coords[members].T, self.topology.shape):
      distinct = np.unique(places)
      if len(distinct) > 1:
        total += self._links(len(distinct), size) / int(np.min(np.diff(distinct)))
    return total * self.topology.chip.link_bandwidth

  def _links(self, distinct: int, size: int) -> int:
    """Links along one dimension that work for a device of a group."""
    is_ring = size > 2 and size % self.topology.chip.wraps == 0
    return 2 if is_ring and distinct > 2 else 1


def _split(collective: Collective, local: int, slices: int) -> tuple[float, float]:
  """Bytes that a device sends within its slice, and to others, of a group over several slices."""
  size, kind = collective.operand_bytes, collective.kind
  if slices == 1:
    return collective.wire_bytes, 0.0
  match kind:
    case 'all-gather':
      return size * slices * sends(kind, local), size * sends(kind, slices)
    case 'all-reduce' | 'reduce-scatter':
      return size * sends(kind, local), size / local * sends(kind, slices)
    case 'collective-permute' | 'collective-broadcast':
      return 0.0, size
  devices = local * slices
  return size * (local - 1) / devices, size * (devices - local) / devices
