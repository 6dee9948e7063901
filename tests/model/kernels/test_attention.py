"""Every attention kernel is the oracle's attention, forward and backward, at awkward shapes.

Splash runs in interpret mode, cuDNN not at all: its arguments run through the same function's other
implementation.
"""

import dataclasses
import functools

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

MODEL = config.Model(
  vocab_size=8, d_model=8, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=8
)
INTERPRETED = functools.partial(attention.splash, interpret=True)
XLA = functools.partial(attention.fused, implementation='xla')

# Length, H, G, K.
SHAPES = {
  'one block': (128, 2, 2, 8),
  'padded to one block, all heads share a key': (37, 3, 1, 10),
  'padded to two blocks': (500, 4, 2, 16),
  'three blocks of 384': (1152, 2, 1, 8),
  'more blocks than the fused backward pass takes': (1408, 2, 1, 8),
}


def inputs(length: int, H: int, G: int, K: int) -> tuple:
  """Segments (2, T) of uneven documents, one row padded at its end; query, key, value, slope."""
  rng = np.random.default_rng(length)
  cuts = np.sort(rng.integers(1, length, (2, 3)), axis=1)
  segments_BT = 1 + np.sum(np.arange(length) >= cuts[:, :, None], axis=1)
  segments_BT[1, cuts[1, 2] :] = 0
  draw = lambda heads: rng.normal(size=(2, length, heads, K)).astype(np.float32)
  return segments_BT.astype(np.int32), draw(H), draw(G), draw(G), draw(H)


def reference(segments_BT, query_BTHK, key_BSGK, value_BSGK, slope_BTHK) -> list[np.ndarray]:
  """The output and the slopes of query, key and value, in float64; FlashAttention's equations."""
  f64 = lambda x: x.astype(np.float64)
  query, key, value, slope = map(f64, (query_BTHK, key_BSGK, value_BSGK, slope_BTHK))
  (B, _, H, K), G = query.shape, key.shape[2]
  output, d_query, d_key, d_value = (np.zeros_like(x) for x in (query, query, key, value))
  for b in range(B):
    visible_TS = oracle.visible(segments_BT[b])
    for h in range(H):
      g = h // (H // G)
      scores_TS = np.where(visible_TS, query[b, :, h] @ key[b, :, g].T / np.sqrt(K), -np.inf)
      weights_TS = oracle.softmax(scores_TS)
      output[b, :, h] = weights_TS @ value[b, :, g]
      d_weights_TS = slope[b, :, h] @ value[b, :, g].T
      d_scores_TS = weights_TS * (d_weights_TS - (weights_TS * d_weights_TS).sum(1, keepdims=True))
      d_query[b, :, h] = d_scores_TS @ key[b, :, g] / np.sqrt(K)
      d_key[b, :, g] += d_scores_TS.T @ query[b, :, h] / np.sqrt(K)
      d_value[b, :, g] += weights_TS.T @ slope[b, :, h]
  return [output, d_query, d_key, d_value]


def computed(kernel, segments_BT, query, key, value, slope) -> list[jax.Array]:
  """The same of a kernel."""

  @jax.jit
  def run(segments_BT, *qkv):
    output, pull = jax.vjp(kernel(segments_BT), *qkv)
    return output, *pull(slope)

  return list(run(segments_BT, query, key, value))


def agree(kernel, shape) -> None:
  case = inputs(*shape)
  for ours, theirs in zip(computed(kernel, *case), reference(*case), strict=True):
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
  'kernel', [attention.plain, XLA, INTERPRETED], ids=['plain', 'xla', 'splash']
)
def test_agrees_with_the_oracle(kernel, shape):
  agree(kernel, shape)


def test_splash_under_shard_map_is_splash_on_one_device():
  segments, *qkv, _ = inputs(128, 2, 1, 8)
  mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
  spread = jax.shard_map(
    lambda segments, *qkv: INTERPRETED(segments)(*qkv),
    mesh=mesh,
    in_specs=PartitionSpec('data'),
    out_specs=PartitionSpec('data'),
    check_vma=False,
  )
  np.testing.assert_array_equal(
    jax.jit(spread)(segments, *qkv), jax.jit(INTERPRETED(segments))(*qkv)
  )


@pytest.mark.parametrize(
  'kernel', [attention.plain, XLA, INTERPRETED], ids=['plain', 'xla', 'splash']
)
def test_bfloat16_stays_bfloat16_and_close(kernel):
  segments, *arrays = inputs(128, 2, 1, 8)
  low = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
  want = reference(segments, *(np.asarray(x, np.float32) for x in low))
  for ours, theirs in zip(computed(kernel, segments, *low), want, strict=True):
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      np.asarray(ours, np.float32), theirs, rtol=0, atol=0.02 * np.abs(theirs).max()
    )


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason='older versions leave it to XLA')
def test_a_policy_that_saves_the_heads_does_not_run_splash_again():
  segments, *qkv, _ = inputs(128, 2, 1, 8)

  def kernels(policy) -> int:
    attend = jax.checkpoint(attention.splash(segments), policy=policy)
    loss = lambda *qkv: jnp.sum(jnp.sin(attend(*qkv)))
    return str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*qkv)).count('pallas_call[')

  assert kernels(jax.checkpoint_policies.nothing_saveable) == 3  # forward twice, backward
  assert kernels(jax.checkpoint_policies.save_only_these_names(remat.HEADS)) == 2


@pytest.mark.parametrize(
  'platform, dtype, head_dim, kernel',
  [
    ('cpu', jnp.float32, 64, blockwise.attention),
    ('cpu', jnp.bfloat16, 64, blockwise.attention),
    ('tpu', jnp.bfloat16, 128, attention.splash),
    ('tpu', jnp.float32, 80, attention.splash),
    ('gpu', jnp.bfloat16, 128, attention.fused),
    ('gpu', jnp.float32, 128, attention.plain),
    ('gpu', jnp.bfloat16, 36, attention.plain),
    ('gpu', jnp.bfloat16, 136, attention.plain),
  ],
)
def test_choice(platform, dtype, head_dim, kernel):
  assert attention.choose(platform, jnp.dtype(dtype), head_dim) is kernel


def test_an_odd_length_does_without_cudnn():
  case = inputs(9, 2, 1, 8)
  for ours, theirs in zip(computed(attention.fused, *case), computed(attention.plain, *case)):
    np.testing.assert_array_equal(ours, theirs)


def test_check_names_the_key_and_the_fix():
  fits = dataclasses.replace(MODEL, head_dim=attention.MAX_HEAD_DIM)
  large = dataclasses.replace(MODEL, head_dim=attention.MAX_HEAD_DIM + 2)
  attention.check(fits, attention.MAX_LENGTH, 'tpu')
  attention.check(large, 10 * attention.MAX_LENGTH, 'cpu')
  attention.check(large, 10 * attention.MAX_LENGTH, 'gpu')
  with pytest.raises(UserError, match=r'^model\.head_dim=258 is above 256, .*: use more .*\.$'):
    attention.check(large, 128, 'tpu')
  with pytest.raises(UserError, match=r'^data\.sequence_length=65537 is above 65536, .*: lower'):
    attention.check(fits, attention.MAX_LENGTH + 1, 'tpu')
