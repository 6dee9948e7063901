"""What attention and FFN know of a token besides its embedding, and rotary position embedding.

RoPE rotates pairs of channels; arXiv 2104.09864, eq. 34.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from bam_jax import config


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Metadata of tokens (B, T): this device's, or those of its whole `expert` group."""

  segments_BT: jax.Array  # int32, the document of each token within its row; 0 is padding
  positions_BT: jax.Array  # int32, within its document
  # ([N,] [E,] B, T, 1, R) float32, for the kinds of layers if there are several, and experts' own.
  sin: jax.Array
  cos: jax.Array
  kind: jax.Array | int | None = None  # of the layer at hand, if there are several: see `kinds`
  start: jax.Array | None = None  # int32, with a KV cache: the slot of the first of these tokens
  first_B: jax.Array | None = None  # int32, with a KV cache: the slot of each row's first token

  @property
  def real_BT(self) -> jax.Array:
    """False on padding, which visits no expert."""
    return self.segments_BT > 0


def kinds(model: config.Model) -> tuple[config.LayerKind, ...]:
  """The different kinds of a model's layers."""
  return tuple(dict.fromkeys(model.layer_kinds()))


def kind_of_layer(model: config.Model) -> list[int] | None:
  """The number among `kinds` of every layer's kind; None if there is only one."""
  different = kinds(model)
  return list(map(different.index, model.layer_kinds())) if len(different) > 1 else None


def frequencies(
  model: config.Model, theta: float, scaling: config.RopeScaling | None, dtype: jnp.dtype
) -> tuple[jax.Array, float]:
  """Radians a position of each pair (R,), and the factor of sine and cosine."""
  channels = model.rotary_dim or model.head_dim
  if not theta:
    return jnp.zeros(channels // 2, dtype), 1.0
  exponents = -jnp.arange(0, channels, 2, dtype=dtype) / channels
  frequency_R = theta**exponents
  if scaling is None:
    return frequency_R, 1.0
  slow_R = frequency_R / scaling.factor
  if scaling.kind == 'linear':
    return slow_R, 1.0
  turns_R = scaling.original_length * frequency_R / (2 * math.pi)
  if scaling.kind == 'llama3':
    kept_R = jnp.clip((turns_R - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return kept_R * frequency_R + (1 - kept_R) * slow_R, 1.0
  # YaRN, arXiv 2309.00071; its bounds are whole pairs, as in transformers.
  length, log = scaling.original_length, math.log
  pair = lambda turns: channels * log(length / (turns * 2 * math.pi)) / (2 * log(theta))
  low = max(math.floor(pair(scaling.beta_fast)), 0)
  high = min(math.ceil(pair(scaling.beta_slow)), channels - 1)
  changed_R = jnp.clip((jnp.arange(channels // 2) - low) / max(high - low, 1e-3), 0, 1)
  factor = scaling.attention_factor or 0.1 * log(max(scaling.factor, 1)) + 1
  return changed_R * slow_R + (1 - changed_R) * frequency_R, factor


def metadata(
  segments_BT: jax.Array, positions_BT: jax.Array, model: config.Model, dtype: jnp.dtype, **cached
) -> Tokens:
  """Metadata of tokens at these positions of their documents, for activations of this dtype."""
  dtype = jnp.promote_types(dtype, jnp.float32)
  positions_BT11 = positions_BT[:, :, None, None].astype(dtype)
  numbers = kind_of_layer(model)
  ropes = model.attention_experts.ropes if model.attention_experts else ()

  def rotation(layer: int, rope: config.Rope | None) -> tuple[jax.Array, jax.Array]:
    kind = model.layer_kinds(rope)[layer]
    frequency_R, factor = frequencies(model, kind.theta, kind.scaling, dtype)
    angles_BT1R = positions_BT11 * frequency_R
    return factor * jnp.sin(angles_BT1R), factor * jnp.cos(angles_BT1R)

  def of_layer(layer: int) -> tuple[jax.Array, ...]:
    if not ropes:
      return rotation(layer, None)
    return tuple(map(jnp.stack, zip(*(rotation(layer, rope) for rope in ropes))))

  if numbers is None:
    return Tokens(segments_BT, positions_BT, *of_layer(0), **cached)
  first_layers = map(numbers.index, range(len(set(numbers))))
  sin, cos = map(jnp.stack, zip(*map(of_layer, first_layers)))
  return Tokens(segments_BT, positions_BT, sin, cos, **cached)


def apply_rope(
  x_BTHK: jax.Array, tokens: Tokens, layout: str = 'interleaved', expert: jax.Array | None = None
) -> jax.Array:
  """Queries or keys rotated to their tokens' positions; in float32, cast back to their dtype.

  `layout` says which of the first 2R channels are pairs: 'interleaved' (2i, 2i + 1), 'half'
  (i, i + R). The others pass. `expert` is a number among all experts, if these have their own.
  """
  sin, cos = tokens.sin, tokens.cos
  if tokens.kind is not None:
    sin, cos = sin[tokens.kind], cos[tokens.kind]
  if expert is not None:
    sin, cos = sin[expert], cos[expert]
  R = sin.shape[-1]
  x_BTH2R = x_BTHK[..., : 2 * R].astype(sin.dtype)
  if layout == 'half':
    one, two = x_BTH2R[..., :R], x_BTH2R[..., R:]
    turned = jnp.concatenate([one * cos - two * sin, one * sin + two * cos], axis=-1)
  else:
    pairs = x_BTH2R.reshape(*x_BTHK.shape[:-1], -1, 2)
    one, two = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([one * cos - two * sin, one * sin + two * cos], axis=-1)
    turned = turned.reshape(x_BTH2R.shape)
  turned = turned.astype(x_BTHK.dtype)
  return (
    turned if 2 * R == x_BTHK.shape[-1] else jnp.concatenate([turned, x_BTHK[..., 2 * R :]], -1)
  )
