"""Collectives of a program: what they send, among which devices, along which axes of the mesh.

Within a slice of TPUs they are instructions; between slices, what each slice hands to its hosts.

Wire bytes are what one device sends in the ring algorithms, which no algorithm betters for large
arrays: of n devices with b bytes each, an all-gather sends (n-1) b, a reduce-scatter (n-1)/n b, an
all-reduce twice that, an all-to-all (n-1)/n b, a permute b.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bam_jax.aot.hlo import Computation, Instruction

KINDS = (
  'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
  'collective-permute', 'collective-broadcast',
)  # fmt: skip
_MESH = re.compile(r'mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}')
_AXIS = re.compile(r"'(\w+)'(?:=(\d+))?(?::\((\d+)\)(\d+))?")


@dataclass(frozen=True)
class Collective:
  """One collective of the program."""

  kind: str
  operand_bytes: int  # of one device
  groups: tuple[tuple[int, ...], ...]  # devices by their position in the mesh; pairs, of a permute

  @property
  def devices(self) -> int:
    """Of one group."""
    return len(self.groups[0])

  @property
  def wire_bytes(self) -> float:
    """What one device sends."""
    return self.operand_bytes * sends(self.kind, self.devices)


def sends(kind: str, devices: int) -> float:
  """What a device sends over the bytes of its operand."""
  n = devices
  match kind:
    case 'all-gather':
      return n - 1
    case 'all-reduce':
      return 2 * (n - 1) / n
    case 'collective-permute' | 'collective-broadcast':
      return 1
  return (n - 1) / n


def read(computation: Computation, instruction: Instruction, devices: int) -> Collective | None:
  """The collective that an instruction is, or starts; None for all else.

  Args:
    computation: that it stands in.
    instruction: any.
    devices: of the whole program.
  """
  if instruction.opcode == 'send':
    return _between_slices(computation, instruction, devices)
  kind = instruction.opcode.removesuffix('-start')
  if kind not in KINDS:
    return None
  if kind == 'all-reduce' and _is_scattered(computation):
    kind = 'reduce-scatter'
  names = instruction.operands[:1] if kind == 'collective-permute' else instruction.operands
  size = sum(array.bytes for name in names for array in computation[name].arrays)
  groups = _groups(instruction, devices)
  return Collective(kind, size, groups) if groups and len(groups[0]) > 1 else None


def _between_slices(
  computation: Computation, instruction: Instruction, devices: int
) -> Collective | None:
  """What a slice sends to the others: its own part of a collective, handed to the hosts."""
  kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower().replace('_', '-')
  if not kind:
    return None
  slices = len(instruction.attribute(r'_xla_megascale_target="\{([\d,]+)\}').split(','))
  size = sum(array.bytes for array in computation.operand(instruction, 0).arrays)
  places = np.arange(devices).reshape(slices, -1).T  # whole slices are outermost in the mesh
  return Collective(kind if kind in KINDS else 'collective-permute', size, _rows(places))


def axes(collective: Collective, sizes: dict[str, int]) -> tuple[str, ...]:
  """The axes of the mesh along which the devices of a group differ, in the mesh's order.

  Args:
    collective: its groups are of positions in the mesh, the last axis varying fastest.
    sizes: devices along each axis.
  """
  places = np.stack(np.unravel_index(np.array(collective.groups), tuple(sizes.values())))
  differ = np.any(places != places[:, :, :1], axis=(1, 2))
  return tuple(name for name, is_along in zip(sizes, differ) if is_along)


def _is_scattered(computation: Computation) -> bool:
  """Whether a fusion keeps a slice of an all-reduce, which TPUs run as a reduce-scatter."""
  root = computation.root
  while root.opcode == 'bitcast':
    root = computation.operand(root, 0)
  if root.opcode != 'dynamic-slice':
    return False
  return computation.operand(root, 0).opcode == 'all-reduce'


def _groups(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
  """Groups of devices, in any of the forms in which HLO writes them."""
  attributes = instruction.attributes
  if 'source_target_pairs=' in attributes:
    pairs = _lists(instruction.attribute(r'source_target_pairs=\{(\{.*?\})\}'))
    return tuple(pair for pair in pairs if pair[0] != pair[1])
  start = attributes.index('replica_groups=') + len('replica_groups=')
  text = attributes[start:]
  if text.startswith('{}'):
    return (tuple(range(devices)),)
  if text.startswith('{'):
    return tuple(_lists(text[: text.index('}}') + 1]))
  if text.startswith('['):
    return _rows(_iota(text))
  return _rows(_named(text))


def _lists(text: str) -> list[tuple[int, ...]]:
  return [tuple(map(int, part.split(','))) for part in re.findall(r'\{([\d,]+)\}', text)]


def _rows(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
  return tuple(map(tuple, ids.tolist()))


def _iota(text: str) -> np.ndarray:
  """`[2,4]<=[4,2]T(1,0)`: numbers in order, shaped [4,2], transposed, and reshaped to [2,4].

  `[4,2]T(1,0)` is the same without the last step.
  """
  found = re.match(r'\[([\d,]+)\](<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?', text)
  if not found:
    raise ValueError(f'Replica groups of a form that is not known: {text[:80]!r}.')
  shape, source = _numbers(found[1]), _numbers(found[3] or found[1])
  ids = np.arange(np.prod(source)).reshape(source)
  ids = ids.transpose(_numbers(found[4])) if found[4] else ids
  return ids.reshape(shape) if found[2] else ids


def _named(text: str) -> np.ndarray:
  """`mesh['a'=2,'b'=4] {'b'}`: along named axes, or `'b':(2)2`, a part of size 2 within b."""
  found = _MESH.match(text)
  if not found:
    raise ValueError(f'Replica groups of a form that is not known: {text[:80]!r}.')
  sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(found[1])}
  ids = _iota(found[2]) if found[2] else np.arange(np.prod([*sizes.values()]))
  along = {name: (before, size) for name, _, before, size in _AXIS.findall(found[3])}
  shape, inner = [], []
  for name, whole in sizes.items():
    before, size = along.get(name, (whole, 1))
    before, size = int(before or 1), int(size or whole)
    inner.append(len(shape) + 1)
    shape += [before, size, whole // (before * size)]
  outer = [dimension for dimension in range(len(shape)) if dimension not in inner]
  ids = ids.reshape(shape).transpose([*outer, *inner])
  return ids.reshape(-1, int(np.prod([shape[dimension] for dimension in inner])))


def _numbers(text: str) -> Sequence[int]:
  return tuple(map(int, text.split(',')))
