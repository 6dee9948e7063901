"""Attention a block of queries at a time is attention, forward and backward."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bam_jax.model.kernels import attention, blockwise

TOLERANCE = {'float64': 1e-12, 'float32': 2e-6, 'bfloat16': 2e-2}  # of the largest element


def question(length: int, heads: int, groups: int, dtype: str):
  """Query, key, value, the slope of the result, and segments with padding."""
  rng = np.random.default_rng(length)
  shapes = [(2, length, n, 6) for n in (heads, groups, groups, heads)]
  arrays = [rng.normal(size=shape).astype(np.float64) for shape in shapes]
  segments_BT = np.sort(rng.integers(1, 4, (2, length)), axis=1).astype(np.int32)
  segments_BT[1, length - length // 3 :] = 0
  return [jnp.asarray(x, dtype) for x in arrays], jnp.asarray(segments_BT)


def value_and_slopes(kernel, arrays, segments_BT):
  *inputs, slope = arrays
  output, pull = jax.vjp(kernel(segments_BT), *inputs)
  return output, *pull(slope)


@pytest.mark.parametrize('heads, groups', [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize(
  'block, length', [(1, 1), (1, 5), (4, 5), (4, 12), (7, 1), (7, 12), (7, 23), (64, 12), (64, 64)]
)
def test_it_is_plain_attention(monkeypatch, block, heads, groups, length):
  monkeypatch.setattr(blockwise, 'BLOCK', block)
  with jax.enable_x64(True):
    arrays, segments_BT = question(length, heads, groups, 'float64')
    want = value_and_slopes(attention.plain, arrays, segments_BT)
    got = value_and_slopes(blockwise.attention, arrays, segments_BT)
    for one, other in zip(got, want):
      assert one.dtype == other.dtype and one.shape == other.shape
      distance = np.abs(one - other).max() / (np.abs(other).max() or 1)
      assert distance < TOLERANCE['float64']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_rounding_is_that_of_the_dtype(dtype):
  arrays, segments_BT = question(300, 4, 2, dtype)  # three blocks of the real size
  exact = [x.astype(jnp.float32) for x in arrays]
  want = value_and_slopes(attention.plain, exact, segments_BT)
  got = value_and_slopes(blockwise.attention, arrays, segments_BT)
  for one, other in zip(got, want):
    assert one.dtype == dtype
    assert np.abs(one.astype(np.float32) - other).max() < TOLERANCE[dtype] * np.abs(other).max()


def test_scores_of_the_whole_never_exist():
  """The program's largest array is of a block of queries, forward and backward."""
  arrays, segments_BT = question(1024, 2, 1, 'float32')

  def largest(kernel):
    run = jax.jit(lambda *a: value_and_slopes(kernel, a, segments_BT))
    shapes = re.findall(r'tensor<((?:\d+x)+)[fi]', run.lower(*arrays).as_text())
    return max(math.prod(map(int, shape.split('x')[:-1])) for shape in shapes)

  assert largest(blockwise.attention) == 2 * 2 * blockwise.BLOCK * 1024
  assert largest(attention.plain) == 2 * 2 * 1024 * 1024
