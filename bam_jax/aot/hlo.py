"""Optimized HLO as text, parsed: computations and their instructions.

The text is what `jax.stages.Compiled.as_text()` gives; there is no public structured form of it.
Only what the counts need is read: shapes with their memory space, operands, called computations,
trip counts and a few attributes.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

DTYPE_BITS = {
  'pred': 8, 's2': 2, 'u2': 2, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 's32': 32,
  'u32': 32, 's64': 64, 'u64': 64, 'bf16': 16, 'f16': 16, 'f32': 32, 'f64': 64, 'c64': 64,
  'c128': 128, 'token': 0, 'opaque': 0,
}  # fmt: skip
MAIN_MEMORY = 0  # HBM; others are on the chip (1 is VMEM) or the host's (5)

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


@dataclass(frozen=True)
class Array:
  """The shape of one array."""

  dtype: str
  dims: tuple[int, ...]
  memory_space: int = MAIN_MEMORY

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Without padding of tiles."""
    return -(-self.size * _bits(self.dtype) // 8)


@dataclass(frozen=True)
class Instruction:
  """One instruction."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]  # of its result, a tuple's flattened
  operands: tuple[str, ...]  # names, in the same computation
  text: str  # what stands between the operands' parentheses: a parameter's number, a literal
  attributes: str  # what stands behind them
  is_root: bool = False

  @functools.cached_property
  def calls(self) -> dict[str, tuple[str, ...]]:
    """Computations by attribute: `calls`, `body`, `condition`, `to_apply`, branches."""
    found = _CALLS.findall(self.attributes)
    return {key: tuple(_NAME.findall(names)) for key, names in found}

  @property
  def target(self) -> str:
    """Of a custom call; empty for other instructions."""
    return self.attribute(r'custom_call_target="([^"]*)"')

  @property
  def source(self) -> str:
    """The path of JAX transformations and primitives that it comes from."""
    return self.attribute(r'op_name="([^"]*)"')

  def attribute(self, pattern: str) -> str:
    """The first group of a pattern in the attributes; empty where there is none."""
    found = re.search(pattern, self.attributes)
    return found[1] if found else ''


class Computation:
  """Instructions in order; scheduled order in a scheduled module."""

  def __init__(self, name: str, instructions: list[Instruction]):
    self.name = name
    self.instructions = {instruction.name: instruction for instruction in instructions}

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())

  def __getitem__(self, name: str) -> Instruction:
    return self.instructions[name]

  @functools.cached_property
  def root(self) -> Instruction:
    return next(instruction for instruction in self if instruction.is_root)

  @functools.cached_property
  def parameters(self) -> tuple[Instruction, ...]:
    """By number."""
    found = (instruction for instruction in self if instruction.opcode == 'parameter')
    return tuple(sorted(found, key=lambda instruction: int(instruction.text)))

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Instructions by the name of what they read."""
    result: dict[str, list[Instruction]] = {}
    for instruction in self:
      for operand in dict.fromkeys(instruction.operands):
        result.setdefault(operand, []).append(instruction)
    return result

  def operand(self, instruction: Instruction, number: int) -> Instruction:
    return self[instruction.operands[number]]


@dataclass(frozen=True)
class Module:
  """A program for one device of many."""

  computations: dict[str, Computation]
  entry: Computation

  def called(self, instruction: Instruction, key: str = 'calls') -> Computation:
    """The computation that an attribute names."""
    return self.computations[instruction.calls[key][0]]


def parse(text: str) -> Module:
  """A module from its text; ValueError when there is no entry computation in it."""
  computations, entry = {}, None
  name, is_entry, statements = '', False, []
  for line in text.splitlines():
    if found := _COMPUTATION.match(line):
      is_entry, name, statements = bool(found[1]), found[2], []
    elif line == '}' and name:
      computation = Computation(name, [_instruction(statement) for statement in statements])
      computations[name] = computation
      entry = computation if is_entry else entry
      name = ''
    elif name and _INSTRUCTION.match(line):
      statements.append(line)
    elif name:
      statements[-1] += line  # attributes of kernels may hold line ends
  if entry is None:
    raise ValueError('No ENTRY computation: this is not the text of an HLO module.')
  return Module(computations, entry)


def arrays(text: str) -> tuple[Array, ...]:
  """The arrays of a shape's text, in order, a tuple's flattened."""
  result = []
  for dtype, dims, layout in _ARRAY.findall(text):
    space = _MEMORY_SPACE.search(layout)
    sizes = tuple(int(size.strip(' <=')) for size in dims.split(',') if size)
    result.append(Array(dtype, sizes, int(space[1]) if space else MAIN_MEMORY))
  return tuple(result)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
  """How often the body of a while loop runs; None where the text does not tell.

  From XLA's own annotation, or else from a condition `counter < limit`, the counter's start and
  its step in the body.
  """
  if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
    return int(known)
  condition, body = module.called(loop, 'condition'), module.called(loop, 'body')
  test = condition.root
  if test.opcode != 'compare' or 'direction=LT' not in test.attributes:
    return None
  counter = _origin(condition, condition.operand(test, 0))
  limit = _constant(condition, condition.operand(test, 1))
  if limit is None or counter.opcode != 'get-tuple-element':
    return None
  index = int(counter.attribute(r'index=(\d+)'))
  start = _constant(computation, _element(computation, computation.operand(loop, 0), index))
  step = _step(body, index)
  if start is None or not step:
    return None
  return max(0, -(-(limit - start) // step))


def _instruction(statement: str) -> Instruction:
  found = _INSTRUCTION.match(statement)
  rest = _COMMENT.sub('', statement[found.end() :])
  end = _closing(rest) if rest.startswith('(') else rest.index(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index('(')
  end = opening + _closing(rest[opening:])
  inside = rest[opening + 1 : end - 1]
  return Instruction(
    name=found[2],
    opcode=rest[:opening],
    arrays=arrays(shape),
    operands=tuple(_NAME.findall(inside)),
    text=inside,
    attributes=rest[end:],
    is_root=bool(found[1]),
  )


def _closing(text: str) -> int:
  """The position behind the parenthesis that closes the first one."""
  depth = 0
  for position, character in enumerate(text):
    depth += (character == '(') - (character == ')')
    if not depth:
      return position + 1
  raise ValueError(f'Unbalanced parentheses in {text[:80]!r}.')


def _bits(dtype: str) -> int:
  return DTYPE_BITS[dtype] if dtype in DTYPE_BITS else 8  # the f8 family


def _origin(computation: Computation, instruction: Instruction) -> Instruction:
  """What an instruction's value is a mere copy of."""
  moves = ('copy', 'copy-start', 'copy-done', 'bitcast', 'reshape', 'convert')
  while instruction.opcode in moves:
    instruction = computation.operand(instruction, 0)
  return instruction


def _constant(computation: Computation, instruction: Instruction) -> int | None:
  found = _origin(computation, instruction)
  return int(found.text) if found.opcode == 'constant' and _is_integer(found.text) else None


def _is_integer(text: str) -> bool:
  return text.lstrip('-').isdigit()


def _element(computation: Computation, value: Instruction, index: int) -> Instruction:
  return computation.operand(value, index) if value.opcode == 'tuple' else value


def _step(body: Computation, index: int) -> int | None:
  """What a loop's body adds to one element of its state."""
  added = _origin(body, _element(body, body.root, index))
  if added.opcode != 'add':
    return None
  constants = [_constant(body, body.operand(added, number)) for number in (0, 1)]
  return next((constant for constant in constants if constant is not None), None)
