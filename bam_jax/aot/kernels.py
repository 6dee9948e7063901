"""FLOPs and bytes of Mosaic (Pallas) kernels, about which HLO's text says little.

- Grouped products (`jax.lax.ragged_dot`; megablox): the kernel's cost estimate is for every row of
  its buffer. Where its grid has a bound that is known only at run time, the kernel visits as many
  tiles of rows as the groups fill, and rows are counted at even load.
- Splash attention gives no estimate: its block sizes and the causal mask tell which blocks it
  visits.
- Any other kernel: its own estimate, or none.

XLA writes the body of its own kernels as text; the windows it declares tell how often the grid
reads each operand from HBM.
"""

import base64
import binascii
import functools
import json
import math
import re
from dataclasses import dataclass

from bam_jax.aot.hlo import MAIN_MEMORY, Array, Computation, Instruction

TARGET = 'tpu_custom_call'
GROUPED = 'grouped'  # a kind
DYNAMIC = -(2**63)  # a bound of the grid that is known only at run time

_GROUPED = re.compile(r'\bragged-dot|\bt?gmm\b')  # in a call's name or source
_SPLASH = re.compile(r'splash_m[hq]a_(fwd|dkv|dq)')
# Products of a visited block. Forward: the scores, and the sum of values. For dk and dv: the scores
# again, the gradient of the weights, and dk and dv. For dq: the same first two, and dq.
_SPLASH_PRODUCTS = {'fwd': 2, 'dkv': 4, 'dq': 3}


@dataclass(frozen=True)
class Window:
  """The part of an operand that one step of the grid works on."""

  shape: tuple[int, ...]
  depends: tuple[frozenset[int], ...]  # what dimensions of the grid each of its coordinates follows

  def bytes(self, array: Array, grid: list[int]) -> float:
    """Bytes that it fetches of `array` while the grid is walked, the last dimension fastest.

    A window that does not move stays. A coordinate takes each of its values once before it starts
    over: rows are sorted by group. Windows at the edge are smaller.
    """
    count, inner_moves = 1, False
    places = [-(-size // part) for size, part in zip(array.dims, self.shape)]
    for dimension in reversed(range(len(grid))):
      values = [n for n, follows in zip(places, self.depends) if dimension in follows]
      moves = min(grid[dimension], math.prod(values)) if values else 1
      count *= grid[dimension] if inner_moves else moves
      inner_moves |= moves > 1
    return count * array.bytes / math.prod(places)


@dataclass(frozen=True)
class Body:
  """What is declared of a kernel: its grid, and the windows of its operands and results."""

  grid: tuple[int, ...]
  windows: tuple[Window, ...]


@dataclass(frozen=True)
class Kernel:
  """What one call costs."""

  kind: str  # GROUPED, 'attention' or 'kernel'
  flops: float | None  # None where nothing tells
  bytes: float


def read(computation: Computation, call: Instruction, even_rows: float | None) -> Kernel:
  """The cost of a Mosaic call.

  Args:
    computation: that it stands in.
    call: the custom call.
    even_rows: of a grouped product's buffer, those that are filled at even load; None is all.
  """
  operands = [array for name in call.operands for array in computation[name].arrays]
  whole = sum(x.bytes for x in (*operands, *call.arrays) if x.memory_space == MAIN_MEMORY)
  flops = _estimate(call, 'flops')
  moved = _estimate(call, 'bytes_accessed') or whole
  if _SPLASH.search(call.name):
    return Kernel('attention', _splash(call, operands), whole)
  if not _GROUPED.search(f'{call.name} {call.source}'):
    return Kernel('kernel', flops, moved)
  if flops is None:
    return Kernel(GROUPED, 0, 0)  # the groups' bookkeeping, a loop over scalars
  body = _body(call)
  if body is None:
    share = _share([array for array in operands if len(array.dims) == 2], even_rows)
    return Kernel(GROUPED, flops * share, moved * share)
  rows = operands[len(call.arrays) - len(body.windows) :]
  share = _share(rows, even_rows) if DYNAMIC in body.grid else 1.0
  return Kernel(GROUPED, flops * share, _fetched(body, operands, call.arrays, share))


def _share(rows: list[Array], even_rows: float | None) -> float:
  """Of a buffer's rows, the first of the arrays, those that are filled at even load."""
  return min(1.0, even_rows / rows[0].dims[0]) if even_rows else 1.0


def _estimate(call: Instruction, key: str) -> float | None:
  number = call.attribute(rf'"cost_estimate":\{{[^}}]*"{key}":"(\d+)"')
  return float(number) if number else None


def _fetched(body: Body, operands: list[Array], results: tuple[Array, ...], share: float) -> float:
  """Bytes between HBM and the chip, when every window is fetched as often as it changes."""
  arrays = [*operands[len(results) - len(body.windows) :], *results]
  rows = arrays[0].dims[0] * share / body.windows[0].shape[0]
  grid = [math.ceil(rows) if bound == DYNAMIC else bound for bound in body.grid]
  return sum(
    window.bytes(array, grid)
    for window, array in zip(body.windows, arrays)
    if array.memory_space == MAIN_MEMORY
  )


def _splash(call: Instruction, operands: list[Array]) -> float | None:
  metadata = call.attribute(r'"xprof_metadata":"(.*?[^\\])"')
  if not metadata:
    return None
  blocks = json.loads(metadata.replace('\\"', '"'))
  kind = _SPLASH.search(call.name)[1]
  suffix = '' if kind == 'fwd' else f'_{kind}'
  query_block, key_block = blocks[f'block_q{suffix}'], blocks[f'block_kv{suffix}']
  query, key = [x for x in operands if x.dtype in ('bf16', 'f32') and len(x.dims) > 2][:2]
  queries, keys = query.dims[-2], key.dims[-2]
  visited = sum(
    min(-(-(end + 1) // key_block) * key_block, keys) * query_block
    for end in range(query_block - 1, queries, query_block)
  )
  products = _SPLASH_PRODUCTS[kind] + (kind == 'dkv' and blocks.get('use_fused_bwd_kernel', False))
  return 2.0 * products * visited * query.size / queries


@functools.lru_cache(maxsize=64)
def _body(call: Instruction) -> Body | None:
  """A kernel's body where it is text, else None."""
  try:
    text = base64.b64decode(call.attribute(r'"body":"([^"]*)"'), validate=True).decode()
  except (binascii.Error, UnicodeDecodeError):
    return None
  grid = re.search(r'iteration_bounds = array<i64: ([^>]*)>', text)
  indices = re.findall(r'transform_indices = @(\w+)', text)
  scalars = re.search(r'scalar_prefetch = (\d+)', text)
  if not (grid and indices and scalars):
    return None
  bounds = tuple(int(bound) for bound in grid[1].split(','))
  references = re.findall(r'memref<([\dx]+)x[a-z]', text[: text.index('attributes')])
  shapes = [tuple(map(int, dims.split('x'))) for dims in references[int(scalars[1]) :]]
  depends = [_depends(text, name, len(bounds)) for name in indices]
  return Body(bounds, tuple(map(Window, shapes, depends)))


def _depends(text: str, name: str, dimensions: int) -> tuple[frozenset[int], ...]:
  """The dimensions of the grid that each coordinate of a window is computed from."""
  function = re.search(rf'func\.func @{name}\(.*?\n  \}}', text, re.DOTALL)[0]
  follows = {f'%arg{number}': frozenset([number]) for number in range(dimensions)}
  for line in function.splitlines()[1:]:
    result, _, expression = line.strip().rpartition(' = ')
    used = [follows.get(value, frozenset()) for value in re.findall(r'%\w+', expression)]
    if expression.startswith('return'):
      return tuple(used)
    follows[result] = frozenset().union(*used)
  raise ValueError(f'{name} of a kernel returns nothing.')
