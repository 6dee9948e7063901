"""Collectives of a program: what they send, between which devices, along which axes of the mesh.

Devices are numbered by their position in the mesh.

Wire bytes are what one device sends in the ring algorithms, which no algorithm beats for large
arrays: of n devices with b bytes each, an all-gather sends (n-1) b, a reduce-scatter (n-1)/n b, an
all-reduce twice that, an all-to-all (n-1)/n b, a permute b.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from bam_jax.aot.hlo import Instruction

KINDS = (
  'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
  'collective-permute', 'collective-broadcast',
)  # fmt: skip
_LISTS = re.compile(r'\{(\{[\d,]+\},?)+\}')
_IOTA = re.compile(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_MESH = re.compile(r'mesh\[([^\]]*)\] \{([^}:]*)\}')


@dataclass(frozen=True, eq=False)
class Collective:
  """One collective."""

  kind: str
  operand_bytes: int  # of one device
  groups: np.ndarray  # of devices, one a row; pairs, of a permute

  @property
  def wire_bytes(self) -> float:
    """What one device sends."""
    return self.operand_bytes * sends(self.kind, self.groups.shape[1])

  def axes(self, sizes: dict[str, int]) -> str:
    """The axes of a mesh of these sizes along which a group's devices differ, joined by "+"."""
    places = np.stack(np.unravel_index(self.groups, tuple(sizes.values())))
    differ = np.any(places != places[:, :, :1], axis=(1, 2))
    return '+'.join(name for name, is_along in zip(sizes, differ) if is_along)


def sends(kind: str, n: int) -> float:
  """What each of n devices sends, over the bytes of its operand."""
  if kind in ('collective-permute', 'collective-broadcast'):
    return 1
  return (n - 1) * {'all-gather': 1, 'all-reduce': 2 / n}.get(kind, 1 / n)


def read(instruction: Instruction, devices: int) -> Collective | None:
  """The collective that an instruction is or starts, of a program for so many devices."""
  opcode = instruction.opcode.removesuffix('-start')
  if opcode not in KINDS:
    return _between_slices(instruction, devices) if opcode == 'send' else None
  groups = _groups(instruction, devices)
  if not len(groups) or groups.shape[1] == 1:
    return None
  kind = 'reduce-scatter' if opcode == 'all-reduce' and _is_scattered(instruction) else opcode
  operands = instruction.operands[: 1 if kind == 'collective-permute' else None]
  return Collective(kind, sum(operand.bytes for operand in operands), groups)


def _between_slices(send: Instruction, devices: int) -> Collective | None:
  """A slice's part of a collective, which it hands to its hosts."""
  kind = send.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower().replace('_', '-')
  if not kind:
    return None
  slices = len(send.attribute(r'_xla_megascale_target="\{([\d,]+)\}').split(','))
  groups = np.arange(devices).reshape(slices, -1).T  # slices are outermost in the mesh
  kind = kind if kind in KINDS else 'collective-permute'
  return Collective(kind, send.operands[0].bytes, groups)


def _is_scattered(all_reduce: Instruction) -> bool:
  """Whether a fusion keeps a slice of an all-reduce, which TPUs run as a reduce-scatter."""

  def is_result(x: Instruction) -> bool:
    return x.is_root or any(user.opcode == 'bitcast' and is_result(user) for user in x.users)

  return any(user.opcode == 'dynamic-slice' and is_result(user) for user in all_reduce.users)


def _groups(instruction: Instruction, devices: int) -> np.ndarray:
  """Groups of devices, in any of the forms of HLO."""
  if text := instruction.attribute(r'source_target_pairs=(\{.*?\}\})'):
    pairs = _lists(text)
    return pairs[pairs[:, 0] != pairs[:, 1]]
  text = instruction.attribute(r'replica_groups=(.*)')
  if text.startswith('{}'):
    return np.arange(devices)[None]
  if found := _LISTS.match(text):
    return _lists(found[0])
  if found := _IOTA.match(text):  # `[2,4]<=[4,2]T(1,0)`: in order as [4,2], transposed, as [2,4]
    shape, source, order = ([int(n) for n in x.split(',')] if x else None for x in found.groups())
    return np.arange(math.prod(source)).reshape(source).transpose(order).reshape(shape)
  if found := _MESH.match(text):  # `mesh['a'=2,'b'=4] {'b'}`: along the named axes
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    ids = np.arange(devices).reshape([int(size) for size in sizes.values()])
    along = [place for place, axis in enumerate(sizes) if f"'{axis}'" in found[2]]
    ids = np.moveaxis(ids, along, range(-len(along), 0))
    return ids.reshape(-1, math.prod(ids.shape[-len(along) :]))
  raise ValueError(f'Replica groups of an unknown form: {text[:80]!r}.')


def _lists(text: str) -> np.ndarray:
  return np.array([row.split(',') for row in re.findall(r'\{([\d,]+)\}', text)], int)
