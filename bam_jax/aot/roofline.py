"""How long a step takes at least, from what its program does and what chips and links can do.

docs/aot.md has the assumptions, the three bounds, and how links are used. Between slices everything
passes the hosts' network: what is gathered crosses it once and is spread inside the slice, what is
reduced the other way round. No collective disturbs another.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bam_jax.aot.collectives import Collective, sends
from bam_jax.aot.cost import Program
from bam_jax.aot.topology import Topology

BOUNDS = ('roofline', 'in_order', 'no_overlap')


class Network:
  """The links between the devices of a mesh."""

  def __init__(self, topology: Topology, devices: Sequence[Any]):
    """Takes the mesh's devices in its order, each with `coords`, and `slice_index` if several."""
    self.topology, dimensions = topology, topology.chip.dimensions
    self.coords = np.array([device.coords[:dimensions] for device in devices])
    self.slices = np.array([getattr(device, 'slice_index', None) or 0 for device in devices])

  def seconds(self, collective: Collective) -> tuple[float, float]:
    """Seconds within slices, and between them; of the slowest group."""
    inside = between = 0.0
    for members in collective.groups:
      slices, counts = np.unique(self.slices[members], return_counts=True)
      local, remote = _split(collective, int(counts[0]), len(slices))
      if local:
        local /= self.bandwidth(members[self.slices[members] == slices[0]])
      inside = max(inside, local)
      between = max(between, remote / self.topology.chip.slices_bandwidth)
    return inside, between

  def bandwidth(self, members: Sequence[int]) -> float:
    """Bytes a second that each device of a group within a slice can send to the others."""
    links = 0.0
    for places, size in zip(self.coords[members].T, self.topology.shape):
      distinct = np.unique(places)
      if len(distinct) > 1:
        is_ring = size > 2 and size % self.topology.chip.wraps == 0
        sharing = int(np.min(np.diff(distinct)))  # groups that lie interleaved
        links += (2 if is_ring and len(distinct) > 2 else 1) / sharing
    return links * self.topology.chip.link_bandwidth


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


def seconds(program: Program, network: Network, sizes: dict[str, int]) -> dict[str, Any]:
  """The times of one step: of `compute`, `hbm`, `wire` by axes, `between_slices`, and BOUNDS.

  `program` is what one device does, `sizes` are those of the mesh's axes.
  """
  chip = network.topology.chip
  wire, between, waited_for = {}, 0.0, 0.0
  for event in program.events:
    local = remote = 0.0
    if event.collective:
      local, remote = network.seconds(event.collective)
      axes = event.collective.axes(sizes)
      wire[axes] = wire.get(axes, 0.0) + event.times * local
      between += event.times * remote
    alone = max(event.flops / chip.flops, event.hbm_bytes / chip.hbm_bandwidth)
    if event.collective and not event.flops:
      alone = 0.0  # links are slower than HBM
    if not event.asynchronous:
      waited_for += event.times * (alone + local + remote)
  compute = sum(program.flops().values()) / chip.flops
  hbm = program.hbm_bytes() / chip.hbm_bandwidth
  roofline = max(compute, hbm, between, *wire.values())
  return {
    'compute': compute,
    'hbm': hbm,
    'wire': wire,
    'between_slices': between,
    'roofline': roofline,
    'in_order': max(waited_for, roofline),
    'no_overlap': compute + hbm + between + sum(wire.values()),
  }
