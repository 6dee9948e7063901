"""Experts of a few rows: each row's own expert, and of the others not a weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bam_jax.model.kernels import visited

FEW = functools.partial(visited.few, interpret=True)
KERNELS = {'loops': visited.loops, 'few': FEW}


def draw(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def oracle(x, experts, gate, up, down):
  output = np.zeros_like(x)
  for row, expert in enumerate(experts):
    if expert < len(gate):
      hidden = x[row] @ gate[expert]
      hidden = hidden / (1 + np.exp(-hidden)) * (x[row] @ up[expert])
      output[row] = hidden @ down[expert]
  return output


# Experts, D, F, and the expert of each row, or as many as there are experts for none.
CASES = {
  'one row': (4, 40, 24, [2]),
  'padding, and an idle expert': (3, 6, 10, [2, 3, 0, 0, 3]),
  'nobody': (2, 8, 12, [2, 2]),
  'as many rows as meet weights at once': (6, 24, 20, [5, 1, 3, 1] * 16),
  'rows of no whole tile, columns of several steps': (3, 1024, 384, [1, 1, 0] * 7),
}


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('kernel', KERNELS)
def test_each_row_meets_its_expert_and_no_other(kernel, name):
  E, D, F, experts = CASES[name]
  x, gate, up, down = draw(0, len(experts), D), draw(1, E, D, F), draw(2, E, D, F), draw(3, E, F, D)
  weights = [w / np.sqrt(w.shape[1]) for w in (gate, up, down)]
  wanted = oracle(x, experts, *weights)
  for w in weights:  # what is read of them would show
    w[[expert for expert in range(E) if expert not in experts]] = np.nan
  if name == 'nobody':  # the grid's one step reads an expert, whose rows then count for nothing
    weights = [np.nan_to_num(w) for w in weights]
  run = jax.jit(KERNELS[kernel])
  output, dropped = run(x, np.array(experts, np.int32), tuple(map(jnp.asarray, weights)))
  np.testing.assert_allclose(output, wanted, atol=2e-5)
  assert output.dtype == x.dtype and dropped == 0


def test_bfloat16_sums_in_float32():
  E, D, F, experts = 3, 64, 256, np.array([1, 0, 1, 1], np.int32)
  arrays = draw(0, 4, D), draw(1, E, D, F) / 8, draw(2, E, D, F) / 8, draw(3, E, F, D) / 16
  x, *weights = (jnp.asarray(array, jnp.bfloat16) for array in arrays)
  output, _ = FEW(x, experts, tuple(weights))
  wanted = oracle(np.float32(x), experts, *map(np.float32, weights))
  assert output.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(output), wanted, atol=0.03)


def test_on_tpus_few_rows_are_the_kernels_and_many_trainings():
  many = lambda x, *rest: ('many', x.shape)
  assert visited.choose('cpu', many) is visited.choose('gpu', many) is visited.loops
  choice = visited.choose('tpu', many)
  shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, 256, 512), (2, 512, 256))]
  weights = shapes[0], shapes[0], shapes[1]
  rows = lambda n: (
    jax.ShapeDtypeStruct((n, 256), jnp.bfloat16), jax.ShapeDtypeStruct((n,), jnp.int32)
  )  # fmt: skip
  assert choice(*rows(65), weights) == ('many', (65, 256))
  for number in (1, 64):
    traced = jax.jit(choice).trace(*rows(number), weights)
    text = traced.lower(lowering_platforms=('tpu',)).as_text()
    assert text.count('tpu_custom_call') == 1 and 'visited_experts' in text
