"""FLOPs and bytes of Mosaic (Pallas) kernels, about which HLO's text says little.

- Grouped products, which XLA makes of `jax.lax.ragged_dot`: the estimate is for every row of the
  buffer. Where a bound of the grid is known only at run time, rows are counted at even load. The
  windows in the kernel's body tell how often the grid fetches each operand from HBM.
- Splash attention: block sizes and the causal mask tell what blocks it visits.
- Any other kernel: its own estimate, or none.
"""

import base64
import json
import math
import re
from typing import NamedTuple

from bam_jax.aot.hlo import HBM, Array, Instruction

TARGET = 'tpu_custom_call'
GROUPED = 'grouped'  # a kind
DYNAMIC = -(2**63)  # a bound of the grid that is known only at run time

_SPLASH = re.compile(r'splash_m[hq]a_(fwd|dkv|dq)')
# Products of a visited block. Forward: the scores, and the sum of values. For dk and dv: the scores
# again, the gradient of the weights, and dk and dv. For dq: the same first two, and dq.
_SPLASH_PRODUCTS = {'fwd': 2, 'dkv': 4, 'dq': 3}


class Window(NamedTuple):
  """The part of an operand that one step of the grid works on."""

  shape: list[int]
  depends: tuple[frozenset[int], ...]  # the grid's dimensions that each coordinate depends on

  def bytes(self, array: Array, grid: list[int]) -> float:
    """Bytes of `array` that are fetched while the grid is walked, its last dimension fastest.

    A window that does not move is not fetched again. A coordinate takes each of its values once
    before it starts over, since rows are sorted by group. Windows at the edge are smaller.
    """
    count, inner_moves = 1, False
    places = [-(-size // part) for size, part in zip(array.dims, self.shape)]
    for dimension in reversed(range(len(grid))):
      values = [n for n, depends in zip(places, self.depends) if dimension in depends]
      moves = min(grid[dimension], math.prod(values)) if values else 1
      count *= grid[dimension] if inner_moves else moves
      inner_moves |= moves > 1
    return count * array.bytes / math.prod(places)


class Kernel(NamedTuple):
  """What one call costs."""

  kind: str  # GROUPED, 'attention' or 'kernel'
  flops: float | None  # None where nothing tells
  bytes: float


def read(call: Instruction, even_rows: float | None) -> Kernel:
  """The cost of a call; of a grouped product's rows `even_rows` are filled, or all."""
  operands = [array for operand in call.operands for array in operand.arrays]
  in_hbm = sum(array.bytes for array in (*operands, *call.arrays) if array.memory_space == HBM)
  if found := _SPLASH.search(call.name):
    return Kernel('attention', _splash_flops(call, operands, found[1]), in_hbm)
  flops, moved = _estimate(call, 'flops'), _estimate(call, 'bytes_accessed') or in_hbm
  if 'ragged-dot' not in f'{call.name} {call.source}':
    return Kernel('kernel', flops, moved)
  if flops is None:
    return Kernel(GROUPED, 0, 0)  # the groups' bookkeeping, a loop over scalars
  grid, windows = _body(call)
  arrays = [*operands[len(call.arrays) - len(windows) :], *call.arrays]
  rows = arrays[0].dims[0]
  share = min(1.0, even_rows / rows) if even_rows and DYNAMIC in grid else 1.0
  tiles = math.ceil(rows * share / windows[0].shape[0])
  bounds = [tiles if bound == DYNAMIC else bound for bound in grid]
  fetched = [window.bytes(array, bounds) for window, array in zip(windows, arrays)]
  moved = sum(size for size, array in zip(fetched, arrays) if array.memory_space == HBM)
  return Kernel(GROUPED, flops * share, moved)


def _estimate(call: Instruction, key: str) -> float | None:
  number = call.attribute(rf'"cost_estimate":\{{[^}}]*"{key}":"(\d+)"')
  return float(number) if number else None


def _splash_flops(call: Instruction, operands: list[Array], kind: str) -> float | None:
  metadata = call.attribute(r'"xprof_metadata":"(.*?[^\\])"')
  if not metadata:
    return None
  blocks = json.loads(metadata.replace('\\"', '"'))
  names = (f'block_{x}' if kind == 'fwd' else f'block_{x}_{kind}' for x in ('q', 'kv'))
  query_block, key_block = (blocks[name] for name in names)
  query, key = [x for x in operands if x.dtype in ('bf16', 'f32') and len(x.dims) > 2][:2]
  queries, keys = query.dims[-2], key.dims[-2]
  visited = sum(
    min(-(-(end + 1) // key_block) * key_block, keys) * query_block
    for end in range(query_block - 1, queries, query_block)
  )
  products = _SPLASH_PRODUCTS[kind] + (kind == 'dkv' and blocks.get('use_fused_bwd_kernel', False))
  return 2.0 * products * visited * query.size / queries


def _body(call: Instruction) -> tuple[list[int], list[Window]]:
  """The grid, and the windows of a grouped product's operands and results."""
  text = base64.b64decode(call.attribute(r'"body":"([^"]*)"')).decode()
  number = lambda found: [int(part) for part in re.split('[, x]+', found)]
  grid = number(re.search(r'iteration_bounds = array<i64: ([^>]*)>', text)[1])
  scalars = int(re.search(r'scalar_prefetch = (\d+)', text)[1])
  references = re.findall(r'memref<([\dx]+)x[a-z]', text[: text.index('attributes')])
  indices = re.findall(r'transform_indices = @(\w+)', text)
  return grid, [
    Window(number(shape), _depends(text, name, len(grid)))
    for shape, name in zip(references[scalars:], indices)
  ]


def _depends(text: str, name: str, dimensions: int) -> tuple[frozenset[int], ...]:
  """The grid's dimensions from which each coordinate of a window is computed."""
  function = re.search(rf'func\.func @{name}\(.*?\n  \}}', text, re.DOTALL)[0]
  depends = {f'%arg{number}': frozenset([number]) for number in range(dimensions)}
  for line in function.splitlines()[1:-1]:  # the last of them returns the coordinates
    result, _, expression = line.strip().rpartition(' = ')
    used = [depends.get(value, frozenset()) for value in re.findall(r'%\w+', expression)]
    depends[result] = frozenset().union(*used)
  return tuple(used)
