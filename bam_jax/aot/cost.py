"""FLOPs, HBM bytes and collectives of a compiled program on one device, loops as often as they run.

This walks the optimized HLO. FLOPs are those of matrix products, 2 for a multiply and add. Bytes
are what instructions read and write in HBM: what the compiler placed on the chip is free, only what
crosses the edge of a fusion counts, slices and gathers read what they take, and updates in place
write what they change. The padding of tiles is not counted.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from bam_jax.aot import collectives, hlo, kernels
from bam_jax.aot.collectives import Collective
from bam_jax.aot.hlo import HBM, Computation, Instruction

FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'call', 'conditional',
  'after-all', 'partition-id', 'replica-id', 'opt-barrier', 'add-dependency', 'domain',
}  # fmt: skip
FREE_TARGETS = {
  'AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound', 'GatherScatterIndicesBitpacked',
  'AsyncCollectiveStart', 'AsyncCollectiveDone',
}  # fmt: skip
COPIES = ('copy-start', 'slice-start', 'dynamic-slice-start')  # while other instructions run
PASSED_ON = ('bitcast', 'reshape', 'get-tuple-element', 'copy', 'convert')


@dataclass(frozen=True)
class Event:
  """One instruction that costs something."""

  times: float  # that it runs; not an integer in a part of a call
  kind: str  # of its FLOPs: 'matmul', or the kind of a kernel
  flops: float
  hbm_bytes: float
  collective: Collective | None = None
  asynchronous: bool = False  # other instructions run meanwhile


@dataclass(frozen=True)
class Program:
  """All events in the order of the text."""

  events: list[Event] = field(default_factory=list)
  # Kernels whose FLOPs are not known, and loops whose trips are not, which are counted once.
  uncounted: list[str] = field(default_factory=list)

  def flops(self) -> dict[str, float]:
    """By kind."""
    total = collections.Counter()
    for event in self.events:
      total[event.kind] += event.times * event.flops
    return {kind: number for kind, number in total.items() if number}

  def hbm_bytes(self) -> float:
    return sum(event.times * event.hbm_bytes for event in self.events)

  def part(self, parts: int) -> 'Program':
    """The costs of one of the equal parts of a call."""
    share = lambda times: times / parts if times % parts else times // parts
    events = [dataclasses.replace(event, times=share(event.times)) for event in self.events]
    return dataclasses.replace(self, events=events)


def read(
  text: str, devices: int, even_rows: float | None = None, trips: Mapping[str, int] | None = None
) -> Program:
  """The costs of an optimized program, given its text, on one of its devices.

  Of a grouped product's buffer `even_rows` are filled at even load, or all. `trips` are those of
  loops whose trips are an argument, by the `jax.named_scope` around them.
  """
  reader = _Reader(devices, even_rows, trips or {}, Program())
  reader.program.events.extend(reader.computation(hlo.parse(text), 1))
  return reader.program


@dataclass(frozen=True)
class _Reader:
  devices: int
  even_rows: float | None
  trips: Mapping[str, int]
  program: Program

  def computation(self, computation: Computation, times: int) -> Iterator[Event]:
    """The events of a computation that runs `times` times."""
    for x in computation.values():
      match x.opcode:
        case 'while':
          scope = x.source.removesuffix('/while').rpartition('/')[2]
          trips = self.trips.get(scope, hlo.trip_count(x))
          if trips is None:
            self.program.uncounted.append(x.name)
            trips = 1
          yield from self.computation(x.calls['body'][0], times * trips)
        case 'call':
          yield from self.computation(x.calls['to_apply'][0], times)
        case 'conditional':
          yield from self.branch(x, times)
        case _:
          event = self.kernel(x, times) if x.target == kernels.TARGET else self.event(x, times)
          if event.collective or event.flops or event.hbm_bytes:
            yield event

  def branch(self, conditional: Instruction, times: int) -> list[Event]:
    """The branch with the most FLOPs, or bytes when none has any.

    Of buffers for grouped products the shortest: each has room for an even load.
    """
    branches = [
      list(self.computation(computation, times))
      for key in ('branch_computations', 'true_computation', 'false_computation')
      for computation in conditional.calls.get(key, ())
    ]
    total = lambda events, key: sum(getattr(event, key) for event in events)
    if all(any(event.kind == kernels.GROUPED for event in events) for events in branches):
      return min(branches, key=lambda events: total(events, 'hbm_bytes'))
    return max(branches, key=lambda x: (total(x, 'flops'), total(x, 'hbm_bytes')))

  def kernel(self, x: Instruction, times: int) -> Event:
    kernel = kernels.read(x, self.even_rows)
    if kernel.flops is None and x.name not in self.program.uncounted:
      self.program.uncounted.append(x.name)
    return Event(times, kernel.kind, kernel.flops or 0, kernel.bytes)

  def event(self, x: Instruction, times: int) -> Event:
    """What any other instruction costs.

    A collective that TPUs run beside several fusions stands in each of them: it is counted in the
    one that starts it.
    """
    starts = any(part.target == 'AsyncCollectiveStart' for part in x.fused)
    beside = 'async_collective_fusion_config'
    parts = [x, *(part for part in x.fused if starts or beside not in part.attributes)]
    found = (collectives.read(part, self.devices) for part in parts)
    collective = next(filter(None, found), None)
    starts |= x.opcode.endswith('-start') or x.opcode == 'send'
    asynchronous = x.opcode in COPIES or bool(collective and starts)
    return Event(times, 'matmul', matmul_flops(x), hbm_bytes(x), collective, asynchronous)


def matmul_flops(x: Instruction) -> int:
  """Of a dot, or of a convolution, as which TPUs compute dots, alone or in a fusion."""
  match x.opcode:
    case 'fusion':
      return sum(map(matmul_flops, x.fused))
    case 'convolution':
      return _convolution_flops(x)
    case 'dot':
      dims = x.operands[0].arrays[0].dims
      contracted = re.findall(r'\d+', x.attribute(r'lhs_contracting_dims=\{([\d,]*)\}'))
      return 2 * x.arrays[0].size * math.prod(dims[int(number)] for number in contracted)
  return 0


def _convolution_flops(convolution: Instruction) -> int:
  """Without the terms that are padding: a batched product is a convolution with much of it.

  As XLA's HloCostAnalysis::HandleConvolution counts it.
  """
  labels = re.split('_|->', convolution.attribute(r'dim_labels=(\S+?)(?:,|$)'))
  arrays = *(operand.arrays[0] for operand in convolution.operands), convolution.arrays[0]
  left, right, out = (dict(zip(names, x.dims)) for names, x in zip(labels, arrays))
  groups = lambda kind: int(convolution.attribute(rf'{kind}_group_count=(\d+)') or 1)
  terms = left['b'] // groups('batch') * (left['f'] // groups('feature')) * right['o']
  window = convolution.attribute(r'window=\{([^}]*)')
  fields = dict(field.split('=') for field in window.split())
  spatial = sorted(filter(str.isdigit, out))
  of = lambda name, default: (fields.get(name) or 'x'.join([default] * len(spatial))).split('x')
  pads = [pad.split('_')[0] for pad in of('pad', '0_0')]
  rest = (of(name, '1') for name in ('stride', 'rhs_dilate', 'lhs_dilate'))
  for label, *numbers in zip(spatial, *rest, pads):
    stride, dilation, hole, pad = map(int, numbers)
    steps, taps = np.arange(out[label])[:, None], np.arange(right[label])
    position, remainder = np.divmod(stride * steps + dilation * taps - pad, hole)
    terms *= int(np.sum((remainder == 0) & (position >= 0) & (position < left[label])))
  return 2 * terms


def hbm_bytes(x: Instruction) -> int:
  """Bytes between HBM and the chip; those of loops, calls and kernels are left to others."""
  if x.opcode in FREE or x.opcode.endswith(('-done', '-update')) or x.target in FREE_TARGETS:
    return 0
  if x.opcode in COPIES:
    moved = x.arrays[0 if x.opcode == 'copy-start' else 1]
    ends = moved.memory_space, x.operands[0].arrays[0].memory_space
    return moved.bytes * ends.count(HBM)
  read = sum(
    _read(x, number)
    for number, operand in enumerate(x.operands)
    if operand.arrays and operand.arrays[0].memory_space == HBM
  )
  written = zip(x.arrays, _written(x))
  return read + sum(size for array, size in written if array.memory_space == HBM)


def _read(reader: Instruction, number: int) -> int:
  """Bytes that an instruction reads of one operand."""
  whole = reader.operands[number].bytes
  match reader.opcode:
    case 'fusion':
      parameters = (x for x in reader.fused if x.opcode == 'parameter')
      return _read_inside(next(x for x in parameters if x.literal == str(number)))
    case 'slice' | 'dynamic-slice' | 'gather' if number == 0:
      return min(reader.bytes, whole)
    case 'dynamic-update-slice' | 'scatter' if number == 0:
      return 0
  return whole


def _read_inside(value: Instruction) -> int:
  """Bytes that a fusion reads of one of its parameters."""
  total, whole = 0, value.bytes
  for user in value.users:
    if user.opcode in PASSED_ON and not user.is_root:
      total += _read_inside(user)
    elif user.opcode != 'tuple' and not _is_asynchronous(user):
      numbers = [n for n, operand in enumerate(user.operands) if operand is value]
      total += sum(_read(user, number) for number in numbers)
  return min(total, whole)


def _is_asynchronous(x: Instruction) -> bool:
  """Whether it is of a collective that runs beside a fusion, or costs nothing."""
  return x.target in FREE_TARGETS or 'replica_groups=' in x.attributes


def _written(x: Instruction, fused: bool = False) -> list[int]:
  """Bytes that an instruction writes of each array of its result, or of its fusion's."""
  if x.opcode == 'fusion':
    return _written(hlo.root(x.calls['calls'][0]), fused=True)
  if x.opcode in ('dynamic-update-slice', 'scatter'):
    return [x.operands[1 if x.opcode == 'dynamic-update-slice' else -1].bytes]
  if x.opcode == 'tuple':
    return [size for operand in x.operands for size in _written(operand, fused)]
  if fused and x.opcode in ('bitcast', 'reshape'):
    return _written(x.operands[0], fused)
  in_place = x.opcode == 'parameter' and not x.is_root
  is_free = fused and (in_place or _is_asynchronous(x))
  return [0 if is_free else array.bytes for array in x.arrays]
