"""Bytes between HBM and the chip, by instruction.

An instruction reads its operands and writes its result, as far as they lie in HBM: what the
compiler placed on the chip costs nothing. Of a fusion only what crosses its edge counts. Slices and
gathers read what they take, updates in place write what they change. Tiles' padding is not counted.
"""

from bam_jax.aot.hlo import MAIN_MEMORY, Computation, Instruction, Module

FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'call', 'conditional',
  'after-all', 'partition-id', 'replica-id', 'opt-barrier', 'add-dependency', 'domain',
}  # fmt: skip
FREE_TARGETS = {
  'AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound', 'GatherScatterIndicesBitpacked',
  'AsyncCollectiveStart', 'AsyncCollectiveDone',
}  # fmt: skip
SLICES = ('slice', 'dynamic-slice', 'gather')
COPIES = ('copy-start', 'slice-start', 'dynamic-slice-start')  # while other instructions run
_PASSED_ON = ('bitcast', 'reshape', 'get-tuple-element', 'copy', 'convert')


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
  """Bytes that one instruction moves; loops and calls are left to their bodies."""
  opcode = instruction.opcode
  if opcode in FREE or opcode.endswith(('-done', '-update')) or instruction.target in FREE_TARGETS:
    return 0
  if opcode in COPIES:
    moved = instruction.arrays[1 if opcode != 'copy-start' else 0]
    source = computation.operand(instruction, 0).arrays[0]
    return moved.bytes * [moved.memory_space, source.memory_space].count(MAIN_MEMORY)
  reads = [
    _read(module, computation, instruction, number) if _in_hbm(computation[name]) else 0
    for number, name in enumerate(instruction.operands)
  ]
  return sum(reads) + sum(
    written
    for array, written in zip(instruction.arrays, _writes(module, computation, instruction))
    if array.memory_space == MAIN_MEMORY
  )


def _in_hbm(value: Instruction) -> bool:
  return bool(value.arrays) and value.arrays[0].memory_space == MAIN_MEMORY


def _size(value: Instruction) -> int:
  return sum(array.bytes for array in value.arrays)


def _read(module: Module, computation: Computation, reader: Instruction, number: int) -> int:
  """Bytes that an instruction reads of one operand."""
  whole = _size(computation.operand(reader, number))
  match reader.opcode:
    case 'slice' | 'dynamic-slice' | 'gather' if number == 0:
      return min(_size(reader), whole)
    case 'dynamic-update-slice' | 'scatter' if number == 0:
      return 0
    case 'fusion':
      inner = module.called(reader)
      return _read_inside(module, inner, inner.parameters[number])
  return whole


def _read_inside(module: Module, inner: Computation, value: Instruction) -> int:
  """Bytes that a fusion reads of one of its parameters."""
  total, whole = 0, _size(value)
  for user in inner.users.get(value.name, []):
    if user.opcode in _PASSED_ON and not user.is_root:
      total += min(_read_inside(module, inner, user), whole)
    elif user.opcode == 'tuple' or user.target in FREE_TARGETS or _is_collective(user):
      continue  # the state of a collective that runs beside the fusion
    else:
      numbers = [n for n, name in enumerate(user.operands) if name == value.name]
      total += sum(min(_read(module, inner, user, number), whole) for number in numbers)
  return min(total, whole)


def _is_collective(instruction: Instruction) -> bool:
  return 'replica_groups=' in instruction.attributes


def _writes(module: Module, computation: Computation, writer: Instruction) -> list[int]:
  """Bytes that an instruction writes of each array of its result."""
  match writer.opcode:
    case 'dynamic-update-slice':
      return [_size(computation.operand(writer, 1))]
    case 'scatter':
      return [_size(computation.operand(writer, len(writer.operands) - 1))]
    case 'fusion':
      inner = module.called(writer)
      return _written_inside(module, inner, inner.root)
  return [array.bytes for array in writer.arrays]


def _written_inside(module: Module, inner: Computation, value: Instruction) -> list[int]:
  """Bytes that a fusion writes of the arrays of its result, or of one element of it."""
  match value.opcode:
    case 'tuple':
      parts = (_written_inside(module, inner, inner[name]) for name in value.operands)
      return [size for part in parts for size in part]
    case 'bitcast' | 'reshape':
      return _written_inside(module, inner, inner.operand(value, 0))
    case 'parameter' if not value.is_root:
      return [0] * len(value.arrays)  # handed through in place
  if _is_collective(value) or value.target in FREE_TARGETS:
    return [0] * len(value.arrays)
  return _writes(module, inner, value)
