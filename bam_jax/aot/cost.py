"""What a compiled program does in one call on one device, loops as often as they run.

XLA's own `cost_analysis` counts a loop's body once and takes kernels at their word; this one walks
the optimized HLO.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bam_jax.aot import collectives, hlo, kernels, products, traffic
from bam_jax.aot.collectives import Collective
from bam_jax.aot.hlo import Computation, Instruction, Module

MATMUL = 'matmul'


@dataclass(frozen=True)
class Event:
  """One instruction that costs something."""

  source: str  # the path of JAX transformations and primitives
  times: float  # in one call of the program; not whole in a part of a call
  flops: dict[str, float] = dataclasses.field(default_factory=dict)  # 'matmul', or a kernel's kind
  hbm_bytes: float = 0
  collective: Collective | None = None
  asynchronous: bool = False  # other instructions run meanwhile


@dataclass(frozen=True)
class Loop:
  """One while loop."""

  source: str
  trips: int | None  # None where the program does not tell; its body is then counted once
  times: int  # that the loop is entered


@dataclass(frozen=True)
class Program:
  """Everything that costs something, in the order of the text."""

  events: tuple[Event, ...]
  loops: tuple[Loop, ...]
  uncounted: tuple[str, ...]  # kernels whose FLOPs nothing tells

  def flops(self) -> dict[str, float]:
    """By kind."""
    total: dict[str, float] = {}
    for event in self.events:
      for kind, number in event.flops.items():
        total[kind] = total.get(kind, 0) + event.times * number
    return total

  def hbm_bytes(self) -> float:
    return sum(event.times * event.hbm_bytes for event in self.events)

  def collectives(self) -> list[Event]:
    return [event for event in self.events if event.collective]

  def part(self, parts: int) -> 'Program':
    """The costs of one of the equal parts of a call; loops are still those of all of it."""

    def share(times: float) -> float:
      return times / parts if times % parts else times // parts

    events = (dataclasses.replace(event, times=share(event.times)) for event in self.events)
    return dataclasses.replace(self, events=tuple(events))


def read(
  text: str,
  devices: int,
  even_rows: float | None = None,
  trips: Mapping[str, int] | None = None,
) -> Program:
  """The costs of an optimized program.

  Args:
    text: of the HLO module, as `jax.stages.Compiled.as_text()` gives it.
    devices: that the program runs on.
    even_rows: of a grouped product's buffer, those that are filled at even load; None is all.
    trips: of loops whose trips an argument says, by the `jax.named_scope` around them.
  """
  return _Walk(hlo.parse(text), devices, even_rows, trips or {}).program()


class _Walk:
  def __init__(
    self, module: Module, devices: int, even_rows: float | None, trips: Mapping[str, int]
  ):
    self.module, self.devices, self.even_rows, self.trips = module, devices, even_rows, trips
    self.loops: list[Loop] = []
    self.uncounted: dict[str, None] = {}

  def program(self) -> Program:
    events = tuple(self.walk(self.module.entry, 1))
    return Program(events, tuple(self.loops), tuple(self.uncounted))

  def walk(self, computation: Computation, times: int) -> Iterator[Event]:
    """The events of a computation that runs `times` times."""
    for instruction in computation:
      match instruction.opcode:
        case 'while':
          trips = self.trip_count(computation, instruction)
          self.loops.append(Loop(instruction.source, trips, times))
          body = self.module.called(instruction, 'body')
          yield from self.walk(body, times * (1 if trips is None else trips))
        case 'call':
          yield from self.walk(self.module.called(instruction, 'to_apply'), times)
        case 'conditional':
          yield from self.taken(instruction, times)
        case 'async-start':
          for event in self.walk(self.module.called(instruction), times):
            yield dataclasses.replace(event, asynchronous=True)
        case _:
          yield from self.events(computation, instruction, times)

  def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
    scope = loop.source.removesuffix('/while').rpartition('/')[2]
    found = hlo.trip_count(self.module, computation, loop)
    return self.trips.get(scope) if found is None else found

  def taken(self, instruction: Instruction, times: int) -> list[Event]:
    """The branch of a conditional with the most FLOPs, or bytes when none has any.

    Of buffers for grouped products the shortest: each has room for an even load.
    """
    keys = ('branch_computations', 'true_computation', 'false_computation')
    names = [name for key in keys for name in instruction.calls.get(key, ())]
    branches = [list(self.walk(self.module.computations[name], times)) for name in names]
    cost = lambda events: (
      sum(sum(event.flops.values()) for event in events),
      sum(event.hbm_bytes for event in events),
    )
    if all(any(kernels.GROUPED in event.flops for event in branch) for branch in branches):
      return min(branches, key=lambda events: cost(events)[1])
    return max(branches, key=cost)

  def events(
    self, computation: Computation, instruction: Instruction, times: int
  ) -> Iterator[Event]:
    """What one instruction costs: at most a computation and a collective."""
    event = Event(
      instruction.source,
      times,
      self.flops(computation, instruction),
      self.bytes(computation, instruction),
      asynchronous=instruction.opcode in traffic.COPIES,
    )
    collective, asynchronous = self.collective(computation, instruction)
    if collective:
      yield dataclasses.replace(event, collective=collective, asynchronous=asynchronous)
    elif event.flops or event.hbm_bytes:
      yield event

  def bytes(self, computation: Computation, instruction: Instruction) -> float:
    if instruction.target == kernels.TARGET:
      return self.kernel(computation, instruction).bytes
    return traffic.hbm_bytes(self.module, computation, instruction)

  def flops(self, computation: Computation, instruction: Instruction) -> dict[str, float]:
    """FLOPs by kind, those inside a fusion included."""
    if instruction.opcode == 'fusion':
      inner, total = self.module.called(instruction), {}
      for part in inner:
        for kind, number in self.flops(inner, part).items():
          total[kind] = total.get(kind, 0) + number
      return total
    if instruction.target == kernels.TARGET:
      kernel = self.kernel(computation, instruction)
      if kernel.flops is None:
        self.uncounted[instruction.name] = None
      return {kernel.kind: kernel.flops} if kernel.flops else {}
    number = products.flops(computation, instruction)
    return {MATMUL: number} if number else {}

  def kernel(self, computation: Computation, instruction: Instruction) -> kernels.Kernel:
    return kernels.read(computation, instruction, self.even_rows)

  def collective(
    self, computation: Computation, instruction: Instruction
  ) -> tuple[Collective | None, bool]:
    """The collective that an instruction starts, and whether others run meanwhile.

    A collective that TPUs run beside several fusions stands in each of them: it is counted in the
    one that starts it.
    """
    found = collectives.read(computation, instruction, self.devices)
    if found or instruction.opcode != 'fusion':
      return found, instruction.opcode.endswith('-start') or instruction.opcode == 'send'
    inner = self.module.called(instruction)
    starts = any(part.target == 'AsyncCollectiveStart' for part in inner)
    for part in inner:
      found = collectives.read(inner, part, self.devices)
      if found and (starts or 'async_collective_fusion_config' not in part.attributes):
        return found, starts
    return None, False
