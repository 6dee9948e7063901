"""Every attention kernel is the oracle's attention, forward and backward, at awkward shapes.

Splash runs in interpret mode, cuDNN not at all: its arguments run through the same function's other
implementation.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.model import remat
from bam_jax.model.kernels import attention, blockwise
from tests.model import oracle

KERNELS = {
  'xla': functools.partial(attention.dot_product, implementation='xla'),
  'splash': functools.partial(attention.splash, interpret=True),
  'blockwise': blockwise.attention,
}
# Length, H, G, K.
SHAPES = {
  'one block': (128, 2, 2, 8),
  'padded to one block, all heads share a key': (37, 3, 1, 10),
  'padded to two blocks': (500, 4, 2, 16),
  'three blocks of 384': (1152, 2, 1, 8),
  'more blocks than the fused backward pass takes': (1408, 2, 1, 8),
}
QUICK = 'padded to one block, all heads share a key', 'padded to two blocks'


@functools.cache
def inputs(length: int, H: int, G: int, K: int) -> tuple:
  """Segments (2, T) of uneven documents, one row padded; query, key, value and cotangent."""
  rng = np.random.default_rng(length)
  cuts = np.sort(rng.integers(0, length + 1, (2, 3)), axis=1)
  segments_BT = 1 + np.sum(np.arange(length) >= cuts[:, :, None], axis=1)
  segments_BT[1, cuts[1, 2] :] = 0
  draw = lambda heads: rng.normal(size=(2, length, heads, K)).astype(np.float32)
  return segments_BT.astype(np.int32), draw(H), draw(G), draw(G), draw(H)


def reference(segments_BT, *arrays, window: int = 0, cap: float = 0.0) -> list[np.ndarray]:
  """The output, and the gradients of query, key and value, in float64."""
  query, key, value, cotangent = (np.asarray(x, np.float64) for x in arrays)
  (B, _, H, K), G = query.shape, key.shape[2]
  output, d_query, d_key, d_value = (np.zeros_like(x) for x in (query, query, key, value))
  for b in range(B):
    visible_TS = oracle.visible(segments_BT[b], window)
    for h in range(H):
      g = h // (H // G)
      scores_TS = oracle.capped(query[b, :, h] @ key[b, :, g].T / np.sqrt(K), cap)
      weights_TS = oracle.softmax(np.where(visible_TS, scores_TS, -np.inf))
      output[b, :, h] = weights_TS @ value[b, :, g]
      d_weights_TS = cotangent[b, :, h] @ value[b, :, g].T
      d_scores_TS = weights_TS * (d_weights_TS - (weights_TS * d_weights_TS).sum(1, keepdims=True))
      d_scores_TS *= 1 - (scores_TS / cap) ** 2 if cap else 1
      d_query[b, :, h] = d_scores_TS @ key[b, :, g] / np.sqrt(K)
      d_key[b, :, g] += d_scores_TS.T @ query[b, :, h] / np.sqrt(K)
      d_value[b, :, g] += weights_TS.T @ cotangent[b, :, h]
  return [output, d_query, d_key, d_value]


def agree(kernel, case, tolerance: float, window: int = 0, cap: float = 0.0) -> None:
  """The kernel's output and gradients are the reference's, relative to the largest element."""
  segments_BT, *arrays, cotangent = case
  caps = (cap,) if cap else ()

  @jax.jit
  def run(*arrays):
    output, pull = jax.vjp(lambda *qkv: kernel(*qkv, segments_BT, window, *caps), *arrays)
    return output, *pull(cotangent)

  for ours, theirs in zip(run(*arrays), reference(*case, window=window, cap=cap), strict=True):
    assert ours.dtype == cotangent.dtype
    largest = np.abs(theirs).max() or 1
    ours = np.asarray(ours, np.float64)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(
  'shape', [pytest.param(s, marks=() if s in QUICK else pytest.mark.slow) for s in SHAPES]
)
@pytest.mark.parametrize('kernel', KERNELS)
def test_agrees_with_the_oracle(kernel, shape):
  agree(KERNELS[kernel], inputs(*SHAPES[shape]), 2e-6)


@pytest.mark.parametrize('window', [1, 100, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize('kernel', KERNELS)
def test_a_window_is_the_oracles(kernel, window):
  agree(KERNELS[kernel], inputs(*SHAPES['padded to two blocks']), 2e-6, window)


@pytest.mark.parametrize('kernel', ['splash', 'blockwise'])  # JAX's attention has none
def test_a_cap_is_the_oracles(kernel):
  agree(KERNELS[kernel], inputs(*SHAPES['padded to two blocks']), 2e-6, 100, 0.5)


@pytest.mark.parametrize('heads, groups', [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize('block, length', [(1, 5), (4, 12), (7, 1), (7, 23), (64, 12)])
def test_blocks_of_any_size_are_the_oracle(monkeypatch, block, length, heads, groups):
  monkeypatch.setattr(blockwise, 'BLOCK', block)
  with jax.enable_x64(True):
    segments, *arrays = inputs(length, heads, groups, 6)
    case = segments, *(jnp.asarray(x, np.float64) for x in arrays)
    agree(blockwise.attention, case, 1e-12)


@pytest.mark.parametrize('kernel', KERNELS)
def test_bfloat16_stays_bfloat16_and_close(kernel):
  segments, *arrays = inputs(128, 2, 1, 8)
  agree(KERNELS[kernel], (segments, *(jnp.asarray(x, jnp.bfloat16) for x in arrays)), 0.02)


def test_splash_under_shard_map_is_splash_on_one_device():
  segments, *qkv, _ = inputs(128, 2, 1, 8)
  mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
  rows = PartitionSpec('data')
  spread = jax.shard_map(
    KERNELS['splash'], mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
  )
  got, want = (jax.jit(kernel)(*qkv, segments) for kernel in (spread, KERNELS['splash']))
  np.testing.assert_array_equal(got, want)


def test_a_policy_that_saves_the_heads_does_not_run_splash_again():
  segments, *qkv, _ = inputs(128, 2, 1, 8)

  def kernels(policy) -> int:
    attend = jax.checkpoint(lambda *qkv: attention.splash(*qkv, segments), policy=policy)
    loss = lambda *qkv: jnp.sum(jnp.sin(attend(*qkv)))
    return str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*qkv)).count('pallas_call[')

  assert kernels(jax.checkpoint_policies.nothing_saveable) == 3  # forward twice, backward
  assert kernels(jax.checkpoint_policies.save_only_these_names(remat.HEADS)) == 2


def test_scores_of_the_whole_never_exist():
  """The program's largest array is of a block of queries, forward and backward."""
  segments_BT, *arrays = inputs(1024, 2, 1, 6)

  def largest(kernel):
    @jax.jit
    def run(*arrays):
      *qkv, cotangent = arrays
      output, pull = jax.vjp(lambda *qkv: kernel(*qkv, segments_BT), *qkv)
      return output, *pull(cotangent)

    shapes = re.findall(r'tensor<((?:\d+x)+)[fi]', run.lower(*arrays).as_text())
    return max(math.prod(map(int, shape.split('x')[:-1])) for shape in shapes)

  assert largest(blockwise.attention) == 2 * 2 * blockwise.BLOCK * 1024
  assert largest(KERNELS['xla']) >= 2 * 2 * 1024 * 1024


@pytest.mark.parametrize(
  'platform, dtype, length, head_dim, chosen',
  [
    ('cpu', jnp.float32, 8, 64, 'blockwise'),
    ('tpu', jnp.bfloat16, 8, 128, 'splash'),
    ('tpu', jnp.float32, 8, 80, 'splash'),
    ('gpu', jnp.bfloat16, 8, 128, 'cudnn'),
    ('gpu', jnp.bfloat16, 9, 128, 'xla'),
    ('gpu', jnp.float32, 8, 128, 'xla'),
    ('gpu', jnp.bfloat16, 8, 36, 'xla'),
    ('gpu', jnp.bfloat16, 8, 136, 'xla'),
  ],
)
def test_choice(monkeypatch, platform, dtype, length, head_dim, chosen):
  monkeypatch.setattr(attention, 'splash', lambda *arrays: 'splash')
  monkeypatch.setattr(attention, 'dot_product', lambda *arrays: arrays[-1])
  monkeypatch.setattr(blockwise, 'attention', lambda *arrays: 'blockwise')
  query = jax.ShapeDtypeStruct((1, length, 1, head_dim), dtype)
  assert attention.attention(query, None, None, None, platform) == chosen
  cap = 'splash' if platform == 'tpu' else 'blockwise'
  assert attention.attention(query, None, None, None, platform, cap=5.0) == cap


def test_check_names_the_key_and_the_fix():
  fits = config.Model(
    vocab_size=8, d_model=8, num_layers=1, num_heads=4, num_kv_heads=2, ffn_dim=8,
    head_dim=attention.MAX_HEAD_DIM,
  )  # fmt: skip
  large = dataclasses.replace(fits, head_dim=attention.MAX_HEAD_DIM + 2)
  attention.check(fits, attention.MAX_LENGTH, 'tpu')
  attention.check(large, 10 * attention.MAX_LENGTH, 'cpu')
  attention.check(large, 10 * attention.MAX_LENGTH, 'gpu')
  with pytest.raises(UserError, match=r'^model\.head_dim=258 is above 256, .*: use more .*\.$'):
    attention.check(large, 128, 'tpu')
  with pytest.raises(UserError, match=r'^data\.sequence_length=65537 is above 65536, .*: lower'):
    attention.check(fits, attention.MAX_LENGTH + 1, 'tpu')
