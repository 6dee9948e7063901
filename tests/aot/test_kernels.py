"""Mosaic kernels: rows at even load, windows as the grid moves them, blocks under the diagonal."""

import base64
import itertools
import json

import pytest

from bam_jax.aot import hlo, kernels

# What XLA writes for `jax.lax.ragged_dot`, as far as it is read. The grid's second bound is the
# number of tiles of rows, which another kernel counts.
BODY = """\
module {{
  func.func @main(%arg0: i32, %arg1: i32, %arg2: i32, %arg3: memref<3xi32, #tpu.smem>, \
%arg4: memref<8xi32, #tpu.smem>, %arg5: memref<8xi32, #tpu.smem>, %arg6: memref<1xi32, #tpu.smem>, \
%arg7: memref<{rows}x{inner}xbf16, #tpu.vmem>, %arg8: memref<1x{inner}x{columns}xbf16, #tpu.vmem>, \
%arg9: memref<{rows}x{columns}xbf16, #tpu.vmem>) attributes {{iteration_bounds = \
array<i64: {bounds}>, scalar_prefetch = 4 : i64, window_params = [{{transform_indices = @left}}, \
{{transform_indices = @right}}, {{transform_indices = @out}}]}} {{
    return
  }}
  func.func @left(%arg0: i32, %arg1: i32, %arg2: i32, %arg3: memref<3xi32, #tpu.smem>) -> i32 {{
    %0 = arith.index_cast %arg1 : i32 to index
    %1 = memref.load %arg5[%0] : memref<8xi32, #tpu.smem>
    return %1, %arg2 : i32, i32
  }}
  func.func @right(%arg0: i32, %arg1: i32, %arg2: i32, %arg3: memref<3xi32, #tpu.smem>) -> i32 {{
    %0 = arith.index_cast %arg1 : i32 to index
    %1 = memref.load %arg4[%0] : memref<8xi32, #tpu.smem>
    return %1, %arg2, %arg0 : i32, i32, i32
  }}
  func.func @out(%arg0: i32, %arg1: i32, %arg2: i32, %arg3: memref<3xi32, #tpu.smem>) -> i32 {{
    %0 = arith.index_cast %arg1 : i32 to index
    %1 = memref.load %arg5[%0] : memref<8xi32, #tpu.smem>
    return %1, %arg0 : i32, i32
  }}
}}
"""
ROWS, INNER, COLUMNS, EXPERTS = 1024, 512, 768, 2
FLOPS = 2 * ROWS * INNER * COLUMNS


def call(name: str, operands: list[str], results: str, target='tpu_custom_call', **config):
  """A custom call of arrays."""
  lines = [f'  %x{n} = {shape} parameter({n})' for n, shape in enumerate(operands)]
  names = ', '.join(f'%x{n}' for n in range(len(operands)))
  text = config.pop('attributes', '')
  backend = json.dumps({'custom_call_config': config}, separators=(',', ':'))
  lines.append(
    f'  ROOT %{name} = {results} custom-call({names}), custom_call_target="{target}", {text}'
    f'backend_config={backend}'
  )
  return hlo.root(hlo.parse('ENTRY %main (x: f32[]) -> f32[] {\n' + '\n'.join(lines) + '\n}\n'))


def grouped(tile: tuple[int, int, int], bounds: str, **estimate):
  rows, inner, columns = tile
  body = BODY.format(rows=rows, inner=inner, columns=columns, bounds=bounds)
  operands = [
    's32[1]{0}', 's32[3]{0}', 's32[8]{0}', 's32[8]{0}', 's32[1]{0}',
    f'bf16[{ROWS},{INNER}]{{1,0}}', f'bf16[{EXPERTS},{INNER},{COLUMNS}]{{2,1,0}}',
  ]  # fmt: skip
  return call(
    'ragged-dot-none.3', operands, f'bf16[{ROWS},{COLUMNS}]{{1,0}}',
    body=base64.b64encode(body.encode()).decode(), **estimate,
  )  # fmt: skip


def moved(tile: tuple[int, int, int], row_tiles: int) -> int:
  """Bytes that the three windows move, by walking the grid; experts have equal rows."""
  rows, inner, columns = tile
  sizes = -(-COLUMNS // columns), row_tiles, -(-INNER // inner)
  grid = itertools.product(*map(range, sizes))
  indices = [((r, k), (r * EXPERTS // row_tiles, k, n), (r, n)) for n, r, k in grid]
  clip = lambda index, part, size: min(part, size - index * part)
  total, before = 0, (None, None, None)
  for now in indices:
    (r, k), (_, _, n), _ = now
    deep, wide = clip(k, inner, INNER), clip(n, columns, COLUMNS)
    sizes = rows * deep, deep * wide, rows * wide
    total += sum(2 * size for size, a, b in zip(sizes, now, before) if a != b)
    before = now
  return total


TILES = [(128, 512, 256), (128, 512, 768), (256, 256, 128), (128, 384, 256)]


@pytest.mark.parametrize('tile', TILES)
@pytest.mark.parametrize('share', [1.0, 0.5])
def test_a_grouped_product_at_even_load(tile, share):
  bounds = f'{-(-COLUMNS // tile[2])}, {kernels.DYNAMIC}, {-(-INNER // tile[1])}'
  instruction = grouped(tile, bounds, cost_estimate={'flops': str(FLOPS)})
  kernel = kernels.read(instruction, share * ROWS)
  assert kernel.kind == 'grouped' and kernel.flops == share * FLOPS
  assert kernel.bytes == moved(tile, int(ROWS * share) // tile[0])


def splash(kind: str, blocks: dict, queries: int, keys: int):
  operands = [
    's8[1,4,4]{2,1,0}', 's8[1,4,4]{2,1,0}', f'bf16[2,6,{queries},128]{{3,2,1,0}}',
    f'bf16[2,2,{keys},128]{{3,2,1,0}}', f'bf16[2,2,{keys},128]{{3,2,1,0}}',
    f's32[2,{queries},128]{{2,1,0}}',
  ]  # fmt: skip
  metadata = json.dumps(json.dumps(blocks))
  attributes = 'frontend_attributes={kernel_metadata={\n"xprof_metadata":' + metadata + '\n}}, '
  name = f'splash_mha_{kind}_segmented_residuals.2'
  return call(name, operands, 'bf16[2,6,8,128]{3,2,1,0:T(8,128)S(1)}', attributes=attributes)


PRODUCTS = [('fwd', False, 2), ('dkv', False, 4), ('dkv', True, 5), ('dq', False, 3)]


@pytest.mark.parametrize('kind, fused, products', PRODUCTS)
@pytest.mark.parametrize('query_block, key_block', [(128, 128), (256, 128), (128, 512)])
def test_splash_visits_the_blocks_that_hold_a_visible_pair(
  kind, fused, products, query_block, key_block
):
  length, suffix = 512, '' if kind == 'fwd' else f'_{kind}'
  blocks = {
    f'block_q{suffix}': query_block, f'block_kv{suffix}': key_block, 'use_fused_bwd_kernel': fused,
    'block_q_dq': None if fused else query_block,
  }  # fmt: skip
  visible = [
    (q, k)
    for q in range(0, length, query_block)
    for k in range(0, length, key_block)
    if k <= q + query_block - 1
  ]
  flops = 2 * products * len(visible) * query_block * key_block * 128 * 2 * 6
  kernel = kernels.read(splash(kind, blocks, length, length), None)
  assert kernel.kind == 'attention' and kernel.flops == flops


def test_other_kernels_say_themselves_or_are_not_known():
  known = call('mine.1', ['f32[8]{0:T(128)S(1)}'], 'f32[8]{0}', cost_estimate={'flops': '77'})
  assert kernels.read(known, 32) == ('kernel', 77.0, 32)
  silent = call('mine.1', ['f32[8]{0}'], 'f32[8]{0}')
  assert kernels.read(silent, 32) == ('kernel', None, 64)
