"""Causal attention within segments: one kernel for each kind of device.

A kernel is made for the segments of a batch and then called by every layer. It names its result
`remat.HEADS`; Splash names what else its backward pass reads too, so that a policy that saves the
name does not run it again.

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

# (query BTHK, key BSGK, value BSGK) -> BTHK, for the segments it was made for.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# Segments BT, int32: a token sees itself and what stands before it in its own segment.
Kernel = Callable[[jax.Array], Attend]

LANES = 128  # of a TPU: Splash's blocks are multiples of it
BLOCK = 512  # the most queries or keys of a block
# Splash's fused backward pass writes the queries' gradient once for each block of keys and adds
# these up. With more blocks than this, one more kernel computes it, and the scores once more.
MOST_COPIES = 8
MAX_HEAD_DIM = 256  # whose blocks fit the vector memory of TPU v4, v5e, v5p and v6e, in any dtype
MAX_LENGTH = 65_536  # the plan of visible blocks takes ten seconds to make, and its square grows


def choose(platform: str, dtype: jnp.dtype, head_dim: int) -> Kernel:
  """The kernel for a platform ('cpu', 'gpu' or 'tpu'), which need not be the one at hand."""
  if platform == 'tpu':
    return splash
  if platform == 'cpu':
    return blockwise.attention
  # What cuDNN takes on every GPU that has bfloat16.
  if platform == 'gpu' and dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128:
    return fused
  return plain


def check(model: config.Model, sequence_length: int, platform: str) -> None:
  """Raises UserError where the platform's kernel cannot do what a run asks for."""
  if platform != 'tpu':
    return
  if model.head_dim > MAX_HEAD_DIM:
    raise UserError(
      f'model.head_dim={model.head_dim} is above {MAX_HEAD_DIM}, the most that attention on TPU '
      'has room for: use more and smaller heads.'
    )
  if sequence_length > MAX_LENGTH:
    raise UserError(
      f'data.sequence_length={sequence_length} is above {MAX_LENGTH}, the most that attention on '
      'TPU is laid out for: lower it.'
    )


def plain(segments_BT: jax.Array) -> Attend:
  """Attention by two einsums; scores and softmax in float32."""
  length = segments_BT.shape[1]
  causal_TS = jnp.tril(jnp.ones((length, length), bool))
  visible_BTS = causal_TS & _same_segment(segments_BT)

  def attend(query_BTHK, key_BSGK, value_BSGK):
    B, T, H, K = query_BTHK.shape
    G = key_BSGK.shape[2]
    dtype = jnp.promote_types(query_BTHK.dtype, jnp.float32)
    query_BTGRK = query_BTHK.reshape(B, T, G, H // G, K) * K**-0.5
    scores_BGRTS = jnp.einsum(
      'btgrk,bsgk->bgrts', query_BTGRK, key_BSGK, preferred_element_type=dtype
    )
    scores_BGRTS = jnp.where(visible_BTS[:, None, None], scores_BGRTS, jnp.finfo(dtype).min)
    weights_BGRTS = jax.nn.softmax(scores_BGRTS).astype(value_BSGK.dtype)
    heads_BTHK = jnp.einsum('bgrts,bsgk->btgrk', weights_BGRTS, value_BSGK).reshape(B, T, H, K)
    return checkpoint_name(heads_BTHK, remat.HEADS)

  return attend


def fused(segments_BT: jax.Array, implementation: str = 'cudnn') -> Attend:
  """`jax.nn.dot_product_attention`, by default cuDNN's flash attention for NVIDIA GPUs.

  It skips what lies after a query. Segments reach it as a mask, which it reads as a bias (B, 1, T,
  S): its packed layout would need none, and is not in JAX's public interface. With a bias cuDNN
  wants an even length; `plain` serves the others.
  """
  if segments_BT.shape[1] % 2:
    return plain(segments_BT)
  same_B1TS = _same_segment(segments_BT)[:, None]

  def attend(query_BTHK, key_BSGK, value_BSGK):
    heads_BTHK = jax.nn.dot_product_attention(
      query_BTHK,
      key_BSGK,
      value_BSGK,
      mask=same_B1TS,
      is_causal=True,
      implementation=implementation,
    )
    return checkpoint_name(heads_BTHK, remat.HEADS)

  return attend


def splash(segments_BT: jax.Array, interpret: bool = False) -> Attend:
  """Splash attention for TPUs: only blocks that hold a visible pair of tokens are computed.

  A length that is no multiple of 128 is padded: keys at the end, which no query sees, and queries
  whose result is cut off.

  Args:
    segments_BT: int32.
    interpret: run the kernel's own steps on any platform, slowly.
  """
  length = segments_BT.shape[1]
  padding = -length % LANES
  ids_BT = jnp.pad(segments_BT, ((0, 0), (0, padding)))
  ids = splash_attention_kernel.SegmentIds(q=ids_BT, kv=ids_BT)

  def attend(query_BTHK, key_BSGK, value_BSGK):
    H, K = query_BTHK.shape[2:]
    kernel = _splash_kernel(H, length + padding, interpret)
    # XLA has the transposes in the matmuls that make these three and take the result.
    query_BHTK, key_BGSK, value_BGSK = (
      jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)
      for x in (query_BTHK * K**-0.5, key_BSGK, value_BSGK)
    )
    heads_BHTK = jax.vmap(kernel)(query_BHTK, key_BGSK, value_BGSK, ids)
    return heads_BHTK.swapaxes(1, 2)[:, :length]

  return attend


@functools.lru_cache  # the plan of visible blocks looks at every pair of positions
def _splash_kernel(num_heads: int, length: int, interpret: bool) -> Callable:
  block = next(size for size in (BLOCK, 384, 256, LANES) if length % size == 0)
  one_kernel = length // block <= MOST_COPIES
  sizes = splash_attention_kernel.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=None if one_kernel else block,
    block_kv_dq=None if one_kernel else block,
    use_fused_bwd_kernel=one_kernel,
  )
  causal = splash_attention_mask.CausalMask((length, length))
  with jax.ensure_compile_time_eval():  # the plan is constants, not part of the caller's trace
    return splash_attention_kernel.make_splash_mha_single_device(
      splash_attention_mask.MultiHeadMask([causal] * num_heads),
      block_sizes=sizes,
      residual_checkpoint_name=remat.HEADS,
      interpret=interpret,
    )


def _same_segment(segments_BT):
  return segments_BT[:, :, None] == segments_BT[:, None, :]
