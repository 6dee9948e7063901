"""Counts of compiled programs, against what was asked to be computed and XLA's own analysis."""

import jax
import jax.numpy as jnp
import pytest

from bam_jax.aot import cost


def shapes(*sizes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
  return [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]


def compiled(function, *args) -> jax.stages.Compiled:
  return jax.jit(function).lower(*args).compile()


def read(function, *args) -> cost.Program:
  return cost.read(compiled(function, *args).as_text(), 1)


CONVOLUTION = dict(window_strides=(2, 1), padding=((1, 2), (0, 3)))
LAYOUT = dict(dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
PRODUCTS = {
  'matmul': (lambda x, y: x @ y, (128, 64), (64, 32)),
  'batched': (lambda x, y: jnp.einsum('btd,bsd->bts', x, y), (4, 128, 64), (4, 32, 64)),
  'two contracted': (lambda x, y: jnp.einsum('bthk,hkd->btd', x, y), (2, 16, 4, 8), (4, 8, 32)),
  'convolution': (
    lambda x, k: jax.lax.conv_general_dilated(
      x, k, lhs_dilation=(1, 2), rhs_dilation=(2, 1), **CONVOLUTION, **LAYOUT
    ),
    (2, 16, 16, 8),
    (3, 3, 8, 4),
  ),
}  # fmt: skip


TRAFFIC = {
  'matmul': (lambda x, y: jnp.tanh(x @ y) * 2, (128, 64), (64, 32)),
  'softmax': (lambda x: jax.nn.softmax(3 * x).T @ x, (1000, 64)),
  'slice': (lambda x: jax.lax.dynamic_slice(x, (jnp.int32(x[0, 0]), 0), (10, 64)) + 1, (1000, 64)),
}


@pytest.mark.parametrize(
  'cases, name', [*((PRODUCTS, x) for x in PRODUCTS), *((TRAFFIC, x) for x in TRAFFIC)]
)
def test_products_and_traffic_as_xla_counts_them(cases, name):
  function, *sizes = cases[name]
  executable = compiled(function, *shapes(*sizes))
  program, counted = cost.read(executable.as_text(), 1), executable.cost_analysis()
  if cases is PRODUCTS:
    assert sum(program.flops().values()) == counted['flops'] > 0
  else:
    assert program.hbm_bytes() == counted['bytes accessed']


def test_gathers_and_updates_in_place_move_what_they_take():
  program = read(lambda x: x[jnp.array([5, 900, 3])], *shapes((1000, 64)))
  assert program.hbm_bytes() == pytest.approx(2 * 3 * 64 * 4, rel=0.05)  # and the indices

  def run(x, rows):
    put = lambda x, part: (jax.lax.dynamic_update_slice(x, part[0][None], (part[1], 0)), None)
    return jax.lax.scan(put, x, (rows, jnp.arange(50)))[0]

  x, rows = shapes((4000, 64), (50, 64))
  program = read(run, x, rows)
  # Not 50 times the array: it is copied once, since it is not donated, and every row moved.
  assert program.hbm_bytes() < 3 * 4000 * 64 * 4


def test_loops_run_as_often_as_they_say_or_once():
  def run(x):
    inner = lambda x, _: (x @ x, None)
    outer = lambda x, _: (jax.lax.scan(inner, x, length=5)[0] @ x, None)
    return jax.lax.scan(outer, x, length=3)[0]

  program = read(run, *shapes((16, 16)))
  assert program.flops() == {'matmul': 3 * (5 + 1) * 2 * 16**3}
  assert not program.uncounted
  known = lambda length, x: jax.lax.fori_loop(0, length, lambda _, x: x @ x, x)
  text = compiled(known, jnp.int32(7), *shapes((16, 16))).as_text()
  program = cost.read(text, 1)
  assert program.flops() == {'matmul': 2 * 16**3} and len(program.uncounted) == 1


def test_a_conditional_costs_its_dearest_branch():
  branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
  program = read(lambda x: jax.lax.switch(jnp.int32(x[0, 0]), branches, x), *shapes((16, 16)))
  assert program.flops() == {'matmul': 2 * 2 * 16**3}


COLLECTIVES = {
  # For x of 8 x 24 a device: how it is sent, the kind, and what one device sends, in floats.
  'sum': (lambda x: jax.lax.psum(x, 'b'), 'all-reduce', 2 * 8 * 24 * 3 / 4),
  'gather': (lambda x: jax.lax.all_gather(x, 'b', tiled=True), 'all-gather', 8 * 24 * 3),
  'scatter': (lambda x: jax.lax.psum_scatter(x, 'b', tiled=True), 'reduce-scatter', 8 * 24 * 3 / 4),
  'transpose': (lambda x: jax.lax.all_to_all(x, 'b', 0, 0), 'all-to-all', 8 * 24 * 3 / 4),
  'shift': (
    lambda x: jax.lax.ppermute(x, 'b', [(i, (i + 1) % 4) for i in range(4)]), 'collective-permute',
    8 * 24,
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', COLLECTIVES)
def test_collectives(name):
  trips, (send, kind, floats) = 3, COLLECTIVES[name]
  mesh = jax.make_mesh((2, 4), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  spec = jax.sharding.PartitionSpec(('a', 'b'))

  def run(x):
    # A different array every time, or XLA would send it once.
    step = lambda total, i: (total + send(jnp.sin(i * x.reshape(4, 2, 24))).sum(), None)
    return jax.lax.scan(step, jnp.zeros(()), jnp.arange(float(trips)))[0][None]

  x = jax.ShapeDtypeStruct((64, 24), jnp.float32)
  mapped = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  program = cost.read(compiled(mapped, x).as_text(), 8)
  (event,) = [event for event in program.events if event.collective]
  assert event.collective.kind == kind and event.times == trips
  assert event.collective.axes(dict(mesh.shape)) == 'b'
  assert len(event.collective.groups[0]) == (2 if kind == 'collective-permute' else 4)
  assert event.collective.wire_bytes == 4 * floats


def test_scanned_layers_are_what_two_unrolled_depths_say():
  def loss(weights, x, unroll):
    layer = jax.checkpoint(lambda x, w: (x + jnp.tanh(x @ w[0]) @ w[1], None))
    return (jax.lax.scan(layer, x, weights, unroll=unroll)[0] ** 2).sum()

  def flops(layers: int, unroll: int) -> float:
    weights = jax.ShapeDtypeStruct((layers, 2, 32, 32), jnp.float32)
    gradient = lambda weights, x: jax.grad(loss, (0, 1))(weights, x, unroll)
    return read(gradient, weights, *shapes((16, 32))).flops()['matmul']

  two, four = flops(2, 2), flops(4, 4)
  assert flops(9, 1) == two + 7 * (four - two) / 2 > 9 * 6 * 2 * 16 * 32 * 32
