"""What attention and FFN know of a token besides its embedding, and rotary position embedding.

RoPE turns interleaved pairs over the whole head; arXiv 2104.09864, eq. 34.
"""

import dataclasses

import jax
import jax.numpy as jnp

from bam_jax import config


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Metadata of tokens (B, T): this device's, or those of its whole `expert` group."""

  segments_BT: jax.Array  # int32, the document of each token within its row; 0 is padding
  sin: jax.Array  # of RoPE, (B, T, 1, K / 2) float32
  cos: jax.Array
  start: jax.Array | None = None  # int32, with a KV cache: the slot of the first of these tokens
  first_B: jax.Array | None = None  # int32, with a KV cache: the slot of each row's first token

  @property
  def real_BT(self) -> jax.Array:
    """False on padding, which visits no expert."""
    return self.segments_BT > 0


def metadata(
  segments_BT: jax.Array, positions_BT: jax.Array, model: config.Model, dtype: jnp.dtype, **cached
) -> Tokens:
  """Metadata of tokens at these positions of their documents, for activations of this dtype."""
  dtype = jnp.promote_types(dtype, jnp.float32)
  exponents = -jnp.arange(0, model.head_dim, 2, dtype=dtype) / model.head_dim
  angles = positions_BT[:, :, None, None].astype(dtype) * model.rope_theta**exponents
  return Tokens(segments_BT, jnp.sin(angles), jnp.cos(angles), **cached)


def apply_rope(x_BTHK: jax.Array, tokens: Tokens) -> jax.Array:
  """Queries or keys rotated to their tokens' positions; in float32, cast back to their dtype."""
  pairs = x_BTHK.reshape(*x_BTHK.shape[:-1], -1, 2).astype(tokens.sin.dtype)
  even, odd, sin, cos = pairs[..., 0], pairs[..., 1], tokens.sin, tokens.cos
  rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return rotated.reshape(x_BTHK.shape).astype(x_BTHK.dtype)
