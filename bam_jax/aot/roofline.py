"""How long a step takes at least, from what its program does and what the chip can do.

Assumptions: every unit works at its peak (matrix units in bfloat16, HBM, links), vector units keep
up, nothing has latency. Three times, from the least to the most that this model allows:

- `roofline`: everything overlaps, and the busiest of compute, HBM, an axis of the mesh, and the
  network between slices is the step.
- `in_order`: instructions run one after the other, each as long as the busier of compute and HBM;
  collectives and copies that the compiler made asynchronous are free as long as the busiest unit
  allows it, others are waited for.
- `no_overlap`: compute, HBM and every collective one after the other.
"""

from dataclasses import dataclass

from bam_jax.aot import collectives
from bam_jax.aot.cost import Event, Program
from bam_jax.aot.network import Network


@dataclass(frozen=True)
class Seconds:
  """Of one step."""

  compute: float
  hbm: float
  wire: dict[str, float]  # by axes of the mesh, as in `label`
  between_slices: float
  waited_for: float  # by the instructions one after the other, without what is asynchronous

  @property
  def roofline(self) -> float:
    return max(self.compute, self.hbm, self.between_slices, *self.wire.values())

  @property
  def in_order(self) -> float:
    return max(self.waited_for, self.roofline)

  @property
  def no_overlap(self) -> float:
    return self.compute + self.hbm + self.between_slices + sum(self.wire.values())


def label(axes: tuple[str, ...]) -> str:
  """The name of a set of axes in tables and JSON."""
  return '+'.join(axes)


def seconds(program: Program, network: Network, sizes: dict[str, int]) -> Seconds:
  """The times of one step.

  Args:
    program: what one device does.
    network: the links between the devices of the mesh.
    sizes: of the mesh's axes.
  """
  chip = network.topology.chip
  wire, between, waited_for = {}, 0.0, 0.0
  for event in program.events:
    local, remote = network.seconds(event.collective) if event.collective else (0.0, 0.0)
    if event.collective:
      name = label(collectives.axes(event.collective, sizes))
      wire[name] = wire.get(name, 0.0) + event.times * local
      between += event.times * remote
    if not event.asynchronous:
      waited_for += event.times * (_alone(event, chip.flops, chip.hbm_bandwidth) + local + remote)
  return Seconds(
    compute=sum(program.flops().values()) / chip.flops,
    hbm=program.hbm_bytes() / chip.hbm_bandwidth,
    wire=wire,
    between_slices=between,
    waited_for=waited_for,
  )


def _alone(event: Event, flops: float, hbm_bandwidth: float) -> float:
  """Seconds of an instruction that runs alone, without what it sends."""
  if event.collective and not event.flops:
    return 0.0  # the links are slower than HBM
  return max(sum(event.flops.values()) / flops, event.hbm_bytes / hbm_bandwidth)
