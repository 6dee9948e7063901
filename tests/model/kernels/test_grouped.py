"""Grouped matmuls are the one-hot einsum's, forward and backward, and compute no empty rows."""

import base64
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu import megablox

from bam_jax.model import dispatch
from bam_jax.model.kernels import grouped

D, F = 6, 10
MEGABLOCKS = functools.partial(grouped.megablocks, interpret=True)
MATMULS = {'ragged': grouped.ragged, 'megablocks': MEGABLOCKS}
# Rows of the buffer, and how many of them are each expert's.
SIZES = {
  'full': (128, [50, 30, 48]),
  'not full, no whole tile, an idle expert': (100, [31, 0, 17]),
  'more tiles than one': (600, [260, 257, 3]),
  'nobody': (40, [0, 0]),
  'one expert': (130, [129]),
}


def draw(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def of_row(num_rows: int, sizes: list[int]) -> np.ndarray:
  """Whether a row is an expert's, (S, E), of rows in order of expert."""
  expert_of_row = np.full(num_rows, len(sizes))
  expert_of_row[: sum(sizes)] = np.repeat(np.arange(len(sizes)), sizes)
  return expert_of_row[:, None] == np.arange(len(sizes))


@pytest.mark.parametrize('num_rows, sizes', SIZES.values(), ids=SIZES)
@pytest.mark.parametrize('matmul', MATMULS.values(), ids=MATMULS)
def test_agrees_with_one_hot(matmul, num_rows, sizes):
  x, w, slope = draw(0, num_rows, D), draw(1, len(sizes), D, F), draw(2, num_rows, F)
  output, pull = jax.vjp(lambda x, w: matmul(x, w, jnp.array(sizes, jnp.int32)), x, w)

  exact = [a.astype(np.float64) for a in (of_row(num_rows, sizes), x, w, slope)]
  want = [
    np.einsum('se,sd,edf->sf', *exact[:3]),
    np.einsum('se,sf,edf->sd', exact[0], exact[3], exact[2]),
    np.einsum('se,sd,sf->edf', exact[0], exact[1], exact[3]),
  ]
  for ours, theirs in zip((output, *pull(slope)), want, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize('matmul', MATMULS.values(), ids=MATMULS)
def test_what_empty_rows_hold_does_not_matter(matmul):
  x, w, slope = draw(0, 300, D), draw(1, 2, D, F), draw(2, 300, F)
  x[101:] = slope[101:] = np.nan
  output, pull = jax.vjp(lambda x, w: matmul(x, w, jnp.array([60, 41], jnp.int32)), x, w)
  d_x, d_w = pull(slope)
  assert not output[101:].any() and not d_x[101:].any()
  assert np.isfinite(output).all() and np.isfinite(d_x).all() and np.isfinite(d_w).all()


def test_megablox_does_not_visit_tiles_past_the_sizes():
  x, w = draw(0, 3 * 128, D), draw(1, 2, D, F)
  sizes = jnp.array([100, 60], jnp.int32)
  output = megablox.gmm(x, w, sizes, jnp.float32, (128, 128, 128), interpret=True)
  # Interpret mode gives an output as NaN until it is written.
  assert np.isfinite(output[:160]).all() and np.isnan(output[256:]).all()


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu')
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason='of the versions that use `ragged`')
@pytest.mark.parametrize('num_rows', [4096, 1003])
def test_compiled_for_a_tpu_ragged_counts_its_tiles_from_the_sizes(num_rows, monkeypatch):
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  chip = topologies.get_topology_desc(topology_name='v5e:2x2', platform='tpu').devices[0]
  place = jax.sharding.SingleDeviceSharding(chip)
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def forward_and_backward(x, w, sizes, slope):
    output, pull = jax.vjp(lambda x, w: grouped.ragged(x, w, sizes), x, w)
    return output, *pull(slope)

  program = jax.jit(forward_and_backward).lower(
    array(jnp.bfloat16, num_rows, 512),
    array(jnp.bfloat16, 4, 512, 256),
    array(jnp.int32, 4),
    array(jnp.bfloat16, num_rows, 256),
  )
  bodies = re.findall('"body":"([^"]*)"', program.compile().as_text())
  found = [
    re.search(rb'iteration_bounds = array<i64: ([^>]*)>', base64.b64decode(b)) for b in bodies
  ]
  grids = [[int(bound) for bound in match[1].split(b',')] for match in found if match]
  unknown = -(2**63)  # until the program runs
  assert len(grids) == 3, 'output and both gradients are kernels, and no matmul is dense'
  assert all(grid.count(unknown) == 1 for grid in grids)


# The rows of a part, and the expert that each pair wants; 3 is none.
CHOICES = {
  'even': (4, [0, 1, 2] * 40),
  'all want one': (4, [1] * 100),
  'nobody wants any': (4, [3] * 20),
  'uneven, some want none': (4, [0] * 3 + [2, 3] * 45 + [0] * 9),
  'one part': (64, [2, 0, 1, 2, 3]),
  'parts of one row': (1, [0, 1, 1, 3, 2, 0]),
}


def one_hot_swiglu(x_PD, weights, chosen_PE):
  """Every expert on every row, those kept that the row wants."""
  gate_EDF, up_EDF, down_EFD = weights
  hidden_PEF = jax.nn.silu(jnp.einsum('pd,edf->pef', x_PD, gate_EDF))
  hidden_PEF *= jnp.einsum('pd,edf->pef', x_PD, up_EDF)
  return jnp.einsum('pef,efd,pe->pd', hidden_PEF, down_EFD, chosen_PE)


@pytest.mark.parametrize('rows, experts', CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize('dtype, tolerance', [(np.float64, 1e-12), (np.float32, 5e-6)])
def test_blocked_agrees_with_one_hot(rows, experts, dtype, tolerance):
  experts_P = np.array(experts, np.int32)
  weights = draw(1, 3, D, F), draw(2, 3, D, F), draw(3, 3, F, D)
  x_PD, slope_PD = draw(0, experts_P.size, D), draw(4, experts_P.size, D)

  def run(x_PD, weights):
    slots = dispatch.blocks(jnp.asarray(experts_P), 3, min(rows, experts_P.size))
    return grouped.in_blocks(0, x_PD, weights, slots)

  def reference(x_PD, weights):
    return one_hot_swiglu(x_PD, weights, experts_P[:, None] == np.arange(3))

  def value_and_slopes(function, dtype):
    x, w, slope = jax.tree.map(lambda a: jnp.asarray(a, dtype), (x_PD, weights, slope_PD))
    output, pull = jax.vjp(function, x, w)
    return jax.tree.leaves((output, pull(slope)))

  with jax.enable_x64(True):
    ours = jax.jit(functools.partial(value_and_slopes, run, dtype))()
    theirs = value_and_slopes(reference, np.float64)
  for one, other in zip(ours, theirs, strict=True):
    assert one.dtype == dtype
    scale = max(np.abs(other).max(), 1)
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


def test_blocked_does_not_visit_parts_past_the_last():
  slots = dispatch.blocks(jnp.array([0, 1, 1, 2, 2, 2, 2], jnp.int32), 2, 2)
  weights = draw(1, 2, D, F), draw(2, 2, D, F), draw(3, 2, F, D)
  x, slope = draw(0, 10, D), draw(4, 10, D)
  x[4:] = slope[4:] = np.nan  # one pair of expert 0 and two of expert 1 fill two parts of five
  x[1] = 0
  output, pull = jax.vjp(lambda x, w: grouped.blocked(x, w, slots), x, weights)
  d_x, d_weights = pull(slope)
  assert not output[4:].any() and not d_x[4:].any()
  assert all(np.isfinite(d_w).all() and d_w.any() for d_w in d_weights)


def test_choice():
  assert grouped.choose('cpu').swiglu is grouped.choose('gpu').swiglu is grouped.in_blocks
  newer = jax.__version_info__ >= (0, 12)
  tpu = grouped.choose('tpu')
  assert tpu.rows == 1 and tpu.swiglu.args == (grouped.ragged if newer else grouped.megablocks,)
