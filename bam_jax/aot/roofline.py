"""How long a step takes at least, from what its program does and what chips and links can do.

Assumptions: every unit works at its peak (matrix units in bfloat16, HBM, links), vector units keep
up, nothing has latency. Three times, from the least to the most that this model allows:

- `roofline`: everything overlaps, and the busiest of compute, HBM, an axis of the mesh, and the
  network between slices is the step.
- `in_order`: instructions run one after the other, each as long as the busier of compute and HBM;
  collectives and copies that the compiler made asynchronous are free as long as the busiest unit
  allows it, others are waited for.
- `no_overlap`: compute, HBM and every collective one after the other.

A slice is a grid of chips with a link to each neighbour; long dimensions are rings, others lines. A
group of devices that lies along a dimension sends both ways around a ring, one way's worth along a
line (its ends have one link), and uses all the dimensions it extends over at once. Groups that lie
interleaved on the same line share its links. Between slices everything passes the hosts' network:
what is gathered crosses it once and is spread inside the slice, what is reduced the other way
round. No collective disturbs another.
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
    inside, between = _split(collective, int(counts[0]), len(slices))
    if inside:
      inside /= self.bandwidth(members[self.slices[members] == slices[0]])
    return inside, between / self.topology.chip.slices_bandwidth

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
    alone = max(sum(event.flops.values()) / chip.flops, event.hbm_bytes / chip.hbm_bandwidth)
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
