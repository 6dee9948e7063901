"""Causal attention within segments: one kernel for each kind of device.

Every kernel names its result `remat.HEADS`, and Splash what else its backward pass reads too, so
that a policy that saves the name does not run it again.

Legend: B batch, T and S sequence, H query heads, G key-value heads, R = H / G, K head.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.model import remat
from bam_jax.model.kernels import blockwise

LANES = 128  # of a TPU: Splash's blocks are multiples of it
BLOCK = 512  # at most, of queries or keys
# Splash's fused backward pass writes the queries' gradient once for each block of keys and adds
# these up. With more blocks than this a second kernel computes it, from scores computed once more.
MAX_FUSED_BLOCKS = 8
MAX_HEAD_DIM = 256  # whose blocks fit the vector memory of TPU v4, v5e, v5p and v6e, in any dtype
MAX_LENGTH = 65_536  # planning the visible blocks takes ten seconds there, and grows as its square


def attention(
  query_BTHK: jax.Array,
  key_BSGK: jax.Array,
  value_BSGK: jax.Array,
  segments_BT: jax.Array,
  platform: str,
) -> jax.Array:
  """Attention of each token to itself and what stands before it in its own segment.

  Args:
    query_BTHK: rotated, not scaled.
    key_BSGK: rotated.
    value_BSGK: all three in the compute dtype.
    segments_BT: int32, equal numbers for tokens of one document.
    platform: 'cpu', 'gpu' or 'tpu', whose kernel runs; it need not be the one at hand.

  Returns:
    (B, T, H, K) in the compute dtype; scores and softmax are float32.
  """
  arrays = query_BTHK, key_BSGK, value_BSGK, segments_BT
  if platform == 'tpu':
    return splash(*arrays)
  if platform == 'cpu':
    return blockwise.attention(*arrays)
  length, head_dim = query_BTHK.shape[1], query_BTHK.shape[3]
  # What cuDNN takes on every GPU that has bfloat16. With a mask it wants an even length.
  if platform == 'gpu' and query_BTHK.dtype == jnp.bfloat16:
    if head_dim % 8 == 0 and head_dim <= 128 and length % 2 == 0:
      return fused(*arrays)
  return plain(*arrays)


def check(model: config.Model, sequence_length: int, platform: str) -> None:
  """Raises UserError where the platform's kernel cannot do what a run asks for."""
  if platform != 'tpu':
    return
  if model.head_dim > MAX_HEAD_DIM:
    raise UserError(
      f'model.head_dim={model.head_dim} is above {MAX_HEAD_DIM}, the maximum for attention on '
      'TPU: use more and smaller heads.'
    )
  if sequence_length > MAX_LENGTH:
    raise UserError(
      f'data.sequence_length={sequence_length} is above {MAX_LENGTH}, the maximum for attention '
      'on TPU: lower it.'
    )


def plain(query_BTHK, key_BSGK, value_BSGK, segments_BT) -> jax.Array:
  """Attention by two einsums."""
  B, T, H, K = query_BTHK.shape
  G = key_BSGK.shape[2]
  dtype = jnp.promote_types(query_BTHK.dtype, jnp.float32)
  visible_BTS = jnp.tril(jnp.ones((T, T), bool)) & _same_segment(segments_BT)
  query_BTGRK = query_BTHK.reshape(B, T, G, H // G, K) * K**-0.5
  scores_BGRTS = jnp.einsum(
    'btgrk,bsgk->bgrts', query_BTGRK, key_BSGK, preferred_element_type=dtype
  )
  scores_BGRTS = jnp.where(visible_BTS[:, None, None], scores_BGRTS, jnp.finfo(dtype).min)
  weights_BGRTS = jax.nn.softmax(scores_BGRTS).astype(value_BSGK.dtype)
  heads_BTHK = jnp.einsum('bgrts,bsgk->btgrk', weights_BGRTS, value_BSGK).reshape(B, T, H, K)
  return checkpoint_name(heads_BTHK, remat.HEADS)


def fused(query_BTHK, key_BSGK, value_BSGK, segments_BT, implementation='cudnn') -> jax.Array:
  """`jax.nn.dot_product_attention`, by default cuDNN's flash attention for NVIDIA GPUs.

  It skips what lies after a query. Segments reach it as a mask, which it reads as a bias
  (B, 1, T, S): its packed layout would need none, but is not in JAX's public interface.
  """
  heads_BTHK = jax.nn.dot_product_attention(
    query_BTHK,
    key_BSGK,
    value_BSGK,
    mask=_same_segment(segments_BT)[:, None],
    is_causal=True,
    implementation=implementation,
  )
  return checkpoint_name(heads_BTHK, remat.HEADS)


def splash(query_BTHK, key_BSGK, value_BSGK, segments_BT, interpret: bool = False) -> jax.Array:
  """Splash attention for TPUs: only blocks that hold a visible pair of tokens are computed.

  A length that is not a multiple of 128 is padded: with keys at the end, which no query sees, and
  queries whose result is cut off. `interpret` runs the kernel's steps on any platform, slowly.
  """
  T, H, K = query_BTHK.shape[1:]
  padding = -T % LANES
  ids_BT = jnp.pad(segments_BT, ((0, 0), (0, padding)))
  ids = splash_attention_kernel.SegmentIds(q=ids_BT, kv=ids_BT)
  kernel = _splash_kernel(H, T + padding, interpret)
  # XLA merges the transposes with the matmuls that make these three and take the result.
  query_BHTK, key_BGSK, value_BGSK = (
    jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)
    for x in (query_BTHK * K**-0.5, key_BSGK, value_BSGK)
  )
  heads_BHTK = jax.vmap(kernel)(query_BHTK, key_BGSK, value_BGSK, ids)
  return heads_BHTK.swapaxes(1, 2)[:, :T]


@functools.lru_cache  # planning the visible blocks looks at every pair of positions
def _splash_kernel(num_heads: int, length: int, interpret: bool) -> Callable:
  block = next(size for size in (BLOCK, 384, 256, LANES) if length % size == 0)
  fused_backward = length // block <= MAX_FUSED_BLOCKS
  sizes = splash_attention_kernel.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=None if fused_backward else block,
    block_kv_dq=None if fused_backward else block,
    use_fused_bwd_kernel=fused_backward,
  )
  causal = splash_attention_mask.CausalMask((length, length))
  with jax.ensure_compile_time_eval():  # the plan is constants, not part of the caller's trace
    return splash_attention_kernel.make_splash_mha_single_device(
      splash_attention_mask.MultiHeadMask([causal] * num_heads),
      block_sizes=sizes,
      residual_checkpoint_name=remat.HEADS,
      interpret=interpret,
    )


def _same_segment(segments_BT: jax.Array) -> jax.Array:
  return segments_BT[:, :, None] == segments_BT[:, None, :]
