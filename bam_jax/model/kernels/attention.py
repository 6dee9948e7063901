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
from bam_jax.config.strict import require
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
  window: int = 0,
  cap: float = 0.0,
) -> jax.Array:
  """Attention of each token to itself and what stands before it in its own segment.

  Args:
    query_BTHK: rotated and not scaled, like the keys.
    key_BSGK: of the same dtype, as are the values.
    value_BSGK: and so is the result, BTHK; scores and softmax are float32.
    segments_BT: int32, equal numbers for tokens of one document.
    platform: 'cpu', 'gpu' or 'tpu', whose kernel runs; it need not be the one at hand.
    window: tokens that a token sees at most, itself included; 0: all before it.
    cap: of the scores, `cap tanh(score / cap)`; 0: none.
  """
  arrays = query_BTHK, key_BSGK, value_BSGK, segments_BT, window
  if platform == 'tpu':
    return splash(*arrays, cap)
  if platform == 'cpu' or cap:  # JAX's attention for GPUs has no cap
    return blockwise.attention(*arrays, cap)
  T, _, K = query_BTHK.shape[1:]
  # What cuDNN takes on every GPU that has bfloat16; with a mask it wants an even length.
  cudnn = query_BTHK.dtype == jnp.bfloat16 and K % 8 == 0 and K <= 128 and T % 2 == 0
  return dot_product(*arrays, 'cudnn' if platform == 'gpu' and cudnn else 'xla')


def check(model: config.Model, sequence_length: int, platform: str) -> None:
  """Raises UserError where the platform's kernel cannot do what a run asks for."""
  if platform != 'tpu':
    return
  wrong = f'model.head_dim={model.head_dim} is above {MAX_HEAD_DIM}, the maximum for attention on'
  require(model.head_dim <= MAX_HEAD_DIM, f'{wrong} TPU: use more and smaller heads.')
  wrong = f'data.{sequence_length=} is above {MAX_LENGTH}, the maximum for attention on TPU'
  require(sequence_length <= MAX_LENGTH, f'{wrong}: lower it.')


def dot_product(
  query_BTHK, key_BSGK, value_BSGK, segments_BT, window: int = 0, implementation: str = 'xla'
) -> jax.Array:
  """`jax.nn.dot_product_attention`, by 'cudnn' flash attention for NVIDIA GPUs and else by 'xla'.

  Segments reach it as a mask, which cuDNN reads as a bias (B, 1, T, S): its packed layout would
  need none, but is not in JAX's public interface.
  """
  same_segment_B1TS = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
  heads_BTHK = jax.nn.dot_product_attention(
    query_BTHK,
    key_BSGK,
    value_BSGK,
    mask=same_segment_B1TS,
    is_causal=True,
    local_window_size=(window - 1, 0) if window else None,
    implementation=implementation,
  )
  return checkpoint_name(heads_BTHK, remat.HEADS)


def splash(
  query_BTHK,
  key_BSGK,
  value_BSGK,
  segments_BT,
  window: int = 0,
  cap: float = 0.0,
  interpret: bool = False,
) -> jax.Array:
  """Splash attention for TPUs: only blocks that hold a visible pair of tokens are computed.

  A length that is not a multiple of 128 is padded: with keys at the end, which no query sees, and
  queries whose result is cut off. `interpret` runs the kernel's steps on any platform, slowly.
  """
  T, H, K = query_BTHK.shape[1:]
  padding = -T % LANES
  ids_BT = jnp.pad(segments_BT, ((0, 0), (0, padding)))
  ids = splash_attention_kernel.SegmentIds(q=ids_BT, kv=ids_BT)
  kernel = _splash_kernel(H, T + padding, window, cap, interpret)
  # XLA merges the transposes with the matmuls that make these three and take the result.
  query_BHTK, key_BGSK, value_BGSK = (
    jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)
    for x in (query_BTHK * K**-0.5, key_BSGK, value_BSGK)
  )
  heads_BHTK = jax.vmap(kernel)(query_BHTK, key_BGSK, value_BGSK, ids)
  return heads_BHTK.swapaxes(1, 2)[:, :T]


@functools.lru_cache  # planning the visible blocks looks at every pair of positions
def _splash_kernel(
  num_heads: int, length: int, window: int, cap: float, interpret: bool
) -> Callable:
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
  mask = splash_attention_mask.CausalMask((length, length))
  if window:
    mask = splash_attention_mask.LocalMask((length, length), (window - 1, 0), 0)
  with jax.ensure_compile_time_eval():  # the plan is constants, not part of the caller's trace
    return splash_attention_kernel.make_splash_mha_single_device(
      splash_attention_mask.MultiHeadMask([mask] * num_heads),
      block_sizes=sizes,
      residual_checkpoint_name=remat.HEADS,
      attn_logits_soft_cap=cap or None,
      interpret=interpret,
    )
