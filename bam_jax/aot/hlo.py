"""Parses the text of optimized HLO into computations of linked instructions.

`jax.stages.Compiled.as_text()` gives the text; there is no public structured form of it. Only what
the counts need is read: shapes with their memory space, operands, called computations, attributes.
"""

import functools
import math
import re
from dataclasses import dataclass, field

DTYPE_BITS = {
  'pred': 8, 's2': 2, 'u2': 2, 's4': 4, 'u4': 4, 's16': 16, 'u16': 16, 'bf16': 16, 'f16': 16,
  's32': 32, 'u32': 32, 'f32': 32, 's64': 64, 'u64': 64, 'f64': 64, 'c64': 64, 'c128': 128,
  'token': 0, 'opaque': 0,
}  # fmt: skip
HBM = 0  # a memory space; others are on the chip (1 is VMEM) or the host's (5)

_ARRAY = re.compile(r'([a-z]+\d*[a-z0-9]*)\[([\d,<= ]*)\](\{[^}]*\})?')
_MEMORY_SPACE = re.compile(r'S\((\d+)\)')
_COMMENT = re.compile(r'/\*.*?\*/')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%([\w.\-]+) = ')
_COMPUTATION = re.compile(r'(ENTRY )?%([\w.\-]+) \(.*\{$')
_NAME = re.compile(r'%([\w.\-]+)')
_CALLS = re.compile(
  r'\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation|'
  r'called_computations)=(\{[^}]*\}|%[\w.\-]+)'
)
_COPIES = ('copy', 'copy-start', 'copy-done', 'bitcast', 'reshape', 'convert')


@dataclass(frozen=True)
class Array:
  """The shape of one array."""

  dtype: str
  dims: tuple[int, ...]
  memory_space: int = HBM

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Without the padding of tiles."""
    return -(-self.size * DTYPE_BITS.get(self.dtype, 8) // 8)  # s8, u8 and the f8 family: 8 bits


@dataclass(eq=False)
class Instruction:
  """One instruction of a computation."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]  # of the result; a tuple's, flattened
  operands: list['Instruction']
  literal: str  # the text between the parentheses: a parameter's number, a constant's value
  attributes: str  # the text behind them
  calls: dict[str, list['Computation']]  # `calls`, `body`, `condition`, `to_apply`, branches
  is_root: bool
  users: list['Instruction'] = field(default_factory=list)

  @property
  def target(self) -> str:
    """Of a custom call; empty for other instructions."""
    return self.attribute(r'custom_call_target="([^"]*)"')

  @property
  def source(self) -> str:
    """The path of the JAX transformations and primitives that it comes from."""
    return self.attribute(r'op_name="([^"]*)"')

  @property
  def bytes(self) -> int:
    """Of all arrays of the result."""
    return sum(array.bytes for array in self.arrays)

  def attribute(self, pattern: str) -> str:
    """The first group of a pattern in the attributes; empty without a match."""
    found = re.search(pattern, self.attributes)
    return found[1] if found else ''


@dataclass(eq=False)
class Computation:
  """Instructions in order, which is that of execution in a scheduled module."""

  name: str
  instructions: dict[str, Instruction]

  @functools.cached_property
  def root(self) -> Instruction:
    return next(x for x in self.instructions.values() if x.is_root)

  @functools.cached_property
  def parameters(self) -> list[Instruction]:
    """In the order of their numbers."""
    found = [x for x in self.instructions.values() if x.opcode == 'parameter']
    return sorted(found, key=lambda x: int(x.literal))


def parse(text: str) -> Computation:
  """The entry computation of a module; ValueError when there is none in the text."""
  computations: dict[str, Computation] = {}
  entry, name, statements = '', '', []
  for line in text.splitlines():
    if found := _COMPUTATION.match(line):
      name, statements = found[2], []
      entry = name if found[1] else entry
    elif line == '}' and name:
      computations[name] = _computation(name, statements, computations)
      name = ''
    elif name and _INSTRUCTION.match(line):
      statements.append(line)
    elif name:
      statements[-1] += line  # attributes of kernels may contain line breaks
  if not entry:
    raise ValueError('No ENTRY computation: this is not the text of an HLO module.')
  return computations[entry]


def _computation(name: str, statements: list[str], computations: dict) -> Computation:
  """Instructions refer to earlier instructions and to computations that were printed before."""
  instructions: dict[str, Instruction] = {}
  for statement in statements:
    found = _INSTRUCTION.match(statement)
    rest = _COMMENT.sub('', statement[found.end() :])
    end = _closing(rest) if rest.startswith('(') else rest.index(' ')
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index('(')
    end = start + _closing(rest[start:])
    literal, attributes = rest[start + 1 : end - 1], rest[end:]
    operands = [] if rest.startswith('constant(') else _NAME.findall(literal)
    instruction = Instruction(
      name=found[2],
      opcode=rest[:start],
      arrays=arrays(shape),
      operands=[instructions[operand] for operand in operands],
      literal=literal,
      attributes=attributes,
      calls={
        key: [computations[called] for called in _NAME.findall(names) if called in computations]
        for key, names in _CALLS.findall(attributes)
      },
      is_root=bool(found[1]),
    )
    for operand in dict.fromkeys(instruction.operands):
      operand.users.append(instruction)
    instructions[instruction.name] = instruction
  return Computation(name, instructions)


def arrays(text: str) -> tuple[Array, ...]:
  """The arrays of a shape's text, in order; those of tuples flattened."""
  result = []
  for dtype, dims, layout in _ARRAY.findall(text):
    space = _MEMORY_SPACE.search(layout)
    sizes = tuple(int(size.strip(' <=')) for size in dims.split(',') if size)
    result.append(Array(dtype, sizes, int(space[1]) if space else HBM))
  return tuple(result)


def _closing(text: str) -> int:
  """The position after the parenthesis that closes the first one."""
  depth = 0
  for position, character in enumerate(text):
    depth += (character == '(') - (character == ')')
    if not depth:
      return position + 1
  raise ValueError(f'Unbalanced parentheses in {text[:80]!r}.')


def trip_count(loop: Instruction) -> int | None:
  """How often the body of a while loop runs; None where the text does not tell.

  From XLA's annotation, or else from a condition `counter < limit`, the counter's initial value,
  and what the body adds to it.
  """
  if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
    return int(known)
  condition, body = loop.calls['condition'][0].root, loop.calls['body'][0].root
  if condition.opcode != 'compare' or 'direction=LT' not in condition.attributes:
    return None
  counter, limit = _origin(condition.operands[0]), _constant(condition.operands[1])
  if limit is None or counter.opcode != 'get-tuple-element':
    return None
  index = int(counter.attribute(r'index=(\d+)'))
  start, added = _constant(_element(loop.operands[0], index)), _origin(_element(body, index))
  if start is None or added.opcode != 'add':
    return None
  steps = [step for step in map(_constant, added.operands) if step]
  return max(0, -(-(limit - start) // steps[0])) if steps else None


def _origin(value: Instruction) -> Instruction:
  """What a value is a mere copy of."""
  while value.opcode in _COPIES:
    value = value.operands[0]
  return value


def _constant(value: Instruction) -> int | None:
  value = _origin(value)
  is_integer = value.opcode == 'constant' and value.literal.lstrip('-').isdigit()
  return int(value.literal) if is_integer else None


def _element(value: Instruction, index: int) -> Instruction:
  return value.operands[index] if value.opcode == 'tuple' else value
