"""Parses the text of optimized HLO into computations of linked instructions.

`jax.stages.Compiled.as_text()` gives the text; JAX offers no structured form of it. Only what
the counts need is read: shapes with their memory space, operands, called computations, attributes.
"""

import math
import re
from dataclasses import dataclass, field

BITS = {'pred': 8, 'token': 0, 'opaque': 0}  # others have them in their name: bf16, f8e4m3fn
HBM = 0  # a memory space; others are on the chip (1 is VMEM) or the host's (5)

_ARRAY = re.compile(r'([a-z]+\d*[a-z0-9]*)\[([\d,<= ]*)\](?:\{[^}]*?S\((\d+)\)[^}]*\})?')
_COMPUTATION = re.compile(
  r'^(ENTRY )?%([\w.\-]+) \([^\n]*\{\n(.*?)^\}[^}\n]*$', re.MULTILINE | re.DOTALL
)
_STATEMENT = re.compile(r'\s+(ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\(([^)]*)\)(.*)')
_NEXT = re.compile(r'\n(?=\s+(?:ROOT )?%[\w.\-]+ = )')
_NAME = re.compile(r'%([\w.\-]+)')
_CALLS = re.compile(
  r'\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)='
  r'(\{[^}]*\}|%[\w.\-]+)'
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
    bits = BITS[self.dtype] if self.dtype in BITS else int(re.search(r'\d+', self.dtype)[0])
    return -(-self.size * bits // 8)


@dataclass(eq=False)
class Instruction:
  """One instruction of a computation."""

  name: str
  opcode: str
  arrays: list[Array]  # of the result; a tuple's, flattened
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

  @property
  def fused(self) -> list['Instruction']:
    """The instructions inside a fusion; empty for other instructions."""
    return list(self.calls['calls'][0].values()) if self.opcode == 'fusion' else []

  def attribute(self, pattern: str) -> str:
    """The first group of a pattern in the attributes; empty without a match."""
    found = re.search(pattern, self.attributes)
    return found[1] if found else ''


Computation = dict[str, Instruction]  # by name, in the order of execution in a scheduled module


def root(computation: Computation) -> Instruction:
  return next(x for x in computation.values() if x.is_root)


def parse(text: str) -> Computation:
  """The entry computation of a module, in whose text a computation comes before its callers."""
  computations: dict[str, Computation] = {}
  for is_entry, name, body in _COMPUTATION.findall(text):
    computations[name] = computation = {}
    for statement in _NEXT.split(body):
      # Attributes of kernels may contain line breaks, long tuples comments with the index.
      statement = re.sub(r'/\*.*?\*/|\n', '', statement)
      instruction = _instruction(statement, computation, computations)
      computation[instruction.name] = instruction
    if is_entry:
      entry = computation
  return entry


def _instruction(
  statement: str, earlier: Computation, computations: dict[str, Computation]
) -> Instruction:
  is_root, name, shape, opcode, literal, attributes = _STATEMENT.match(statement).groups()
  calls = {
    key: [computations[called] for called in _NAME.findall(names) if called in computations]
    for key, names in _CALLS.findall(attributes)
  }
  operands = [] if opcode == 'constant' else [earlier[x] for x in _NAME.findall(literal)]
  arrays = [
    Array(dtype, tuple(int(n.strip(' <=')) for n in dims.split(',') if n), int(space or HBM))
    for dtype, dims, space in _ARRAY.findall(shape)
  ]
  made = Instruction(name, opcode, arrays, operands, literal, attributes, calls, bool(is_root))
  for operand in dict.fromkeys(operands):
    operand.users.append(made)
  return made


def trip_count(loop: Instruction) -> int | None:
  """How often the body of a while loop runs; None where the text does not tell.

  From XLA's annotation, or else from a condition `counter < limit`.
  """
  if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
    return int(known)
  test, body = root(loop.calls['condition'][0]), root(loop.calls['body'][0])
  if test.opcode != 'compare' or 'direction=LT' not in test.attributes:
    return None
  counter, limit = _origin(test.operands[0]), _constant(test.operands[1])
  if limit is None or counter.opcode != 'get-tuple-element':
    return None
  element = lambda x: x.operands[index] if x.opcode == 'tuple' else x
  index = int(counter.attribute(r'index=(\d+)'))
  start, added = _constant(element(loop.operands[0])), _origin(element(body))
  if start is None or added.opcode != 'add':
    return None
  steps = [step for step in map(_constant, added.operands) if step]
  return max(0, -(-(limit - start) // steps[0])) if steps else None


def _origin(x: Instruction) -> Instruction:
  """What a value is a mere copy of."""
  while x.opcode in _COPIES:
    x = x.operands[0]
  return x


def _constant(x: Instruction) -> int | None:
  x = _origin(x)
  is_integer = x.opcode == 'constant' and x.literal.lstrip('-').isdigit()
  return int(x.literal) if is_integer else None
