"""Projections of routed attention: every row meets the matrix of its expert and no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bam_jax.aot import hlo
from bam_jax.generate.decode import Apart
from bam_jax.model.kernels import blocked, grouped, projection

# The rows of a part, and the expert of each row; 3 is none.
CASES = {
  'nobody wants any': (4, [3] * 20),
  'uneven, an idle expert, some want none': (4, [0] * 3 + [2, 3] * 45 + [0] * 9),
  'one part': (64, [2, 0, 1, 2, 3]),
  'one row': (64, [2]),
}
# For each platform the shapes of a row, of an expert's matrix and of a result: query and output.
SHAPES = {'cpu': ((6,), (6, 5, 2), (10,)), 'tpu': ((10,), (5, 2, 6), (6,))}


def draw(A: int, platform: str) -> list[np.ndarray]:
  """Rows, matrices, and a cotangent of the result."""
  rng = np.random.default_rng(0)
  return [rng.normal(size=(n, *shape)) for n, shape in zip((A, 3, A), SHAPES[platform])]


def with_gradients(platform: str):
  def run(experts_A, x_AD, w, d_output_AF):
    slots = projection.slots(experts_A, 3, platform)
    output_AF, pull = jax.vjp(lambda *xw: projection.project(*xw, slots, platform), x_AD, w)
    return output_AF, *pull(d_output_AF)

  return jax.jit(run)


@pytest.mark.parametrize('rows, experts', CASES.values(), ids=CASES)
@pytest.mark.parametrize('platform', SHAPES)
def test_agrees_with_one_hot(platform, rows, experts, monkeypatch):
  monkeypatch.setattr(grouped, 'BLOCK_ROWS', {'cpu': rows})
  experts_A, (x_AD, w, d_AF) = np.array(experts, np.int32), draw(len(experts), platform)
  chosen_AE = 1.0 * (experts_A[:, None] == np.arange(3))
  w_EDF = w.reshape(3, x_AD.shape[1], -1)
  output_AF = np.einsum('ae,ad,edf->af', chosen_AE, x_AD, w_EDF)
  d_x_AD = np.einsum('ae,af,edf->ad', chosen_AE, d_AF, w_EDF)
  d_w = np.einsum('ae,ad,af->edf', chosen_AE, x_AD, d_AF).reshape(w.shape)
  x_AD[experts_A == 3] = d_AF[experts_A == 3] = np.nan  # what they hold does not matter
  with jax.enable_x64(True):
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 5e-6)):
      x, matrices, d = (jnp.asarray(array, dtype) for array in (x_AD, w, d_AF))
      slots = projection.slots(experts_A, 3, platform)
      got = list(with_gradients(platform)(experts_A, x, matrices, d))
      for lying in (matrices, Apart(tuple(matrices[:, None]))):
        got.append(projection.project(x, lying, slots, platform, decoding=True))
      for ours, theirs in zip(got, (output_AF, d_x_AD, d_w, output_AF, output_AF), strict=True):
        np.testing.assert_allclose(ours, theirs, 0, tolerance * max(np.abs(theirs).max(), 1))
        assert ours.dtype == dtype


@pytest.mark.parametrize('platform', SHAPES)
def test_gradients_of_bfloat16_matrices_are_summed_in_float32(platform, monkeypatch):
  monkeypatch.setattr(grouped, 'BLOCK_ROWS', {'cpu': 1})
  x, w = jnp.ones((4096, 2), jnp.bfloat16), jnp.ones((3, 2, 2), jnp.bfloat16)
  output, d_x, d_w = with_gradients(platform)(np.ones(4096, np.int32), x, w, x)
  assert output.dtype == d_x.dtype == d_w.dtype == jnp.bfloat16
  assert (d_w[1] == 4096).all() and not d_w[::2].any()  # sums in bfloat16 end at 2048


def dots(computation: hlo.Computation, in_loop: bool = False):
  """The matrix products of a compiled program, and whether each is inside a loop."""
  for x in computation.values():
    if x.opcode == 'dot':
      yield x, in_loop
    for inner in sum(x.calls.values(), []):
      yield from dots(inner, in_loop or x.opcode == 'while')


def test_a_row_meets_one_expert():
  experts_A = np.random.default_rng(1).integers(0, 4, 1000).astype(np.int32)
  slots = projection.slots(experts_A, 3, 'cpu')
  count = lambda rows, start, expert, total: total + rows
  visited = blocked.each_piece(slots.assignment_of_slot.size, slots, count, 0)
  assert visited < sum(experts_A < 3) + 3 * 64, 'each expert has one part that is not full'
  program = with_gradients('cpu').lower(experts_A, *draw(1000, 'cpu')).compile().as_text()
  found = list(dots(hlo.parse(program)))
  assert len(found) == 3 * blocked.MAX_PARTS  # the result and two gradients, of 1 to 8 parts
  for dot, in_loop in found:
    sizes = {size for x in (dot, *dot.operands) for size in x.arrays[0].dims}
    assert in_loop and {6, 10} < sizes <= {6, 10, *range(64, 64 * blocked.MAX_PARTS + 1, 64)}
