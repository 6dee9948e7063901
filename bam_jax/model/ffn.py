"""SwiGLU, dense and as a mixture of routed experts; arXiv 2002.05202.

Legend: B batch, T sequence, D model, F hidden, E experts, k experts a token visits, A = BTk
assignments of a token to an expert, R rows of one expert's buffer.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bam_jax import config
from bam_jax.model import dispatch, parameters, remat, router
from bam_jax.model.kernels import few, grouped
from bam_jax.model.rope import Tokens
from bam_jax.parallel.collectives import Layout


class FFN(nnx.Module):
  """Dense SwiGLU: `(silu(x W_gate) * (x W_up)) W_down`."""

  def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
    """Parameters of all the layers: `gate` and `up` LDF, `down` LFD."""
    L, D, F = model.num_layers, model.d_model, model.ffn_dim
    self.gate = parameters.normal(rngs, (L, D, F), D)
    self.up = parameters.normal(rngs, (L, D, F), D)
    self.down = parameters.normal(rngs, (L, F, D), F, (2 * L) ** -0.5)

  def __call__(self, y_BTD: jax.Array, tokens: Tokens) -> tuple[jax.Array, None]:
    """One layer's FFN of normalised tokens (B, T, D); no router chooses."""
    # As a matrix: XLA's backward pass on CPU takes three times as long for more dimensions.
    x_ND = y_BTD.astype(self.gate.dtype).reshape(-1, y_BTD.shape[-1])
    gate_NF = checkpoint_name(x_ND @ self.gate[...], remat.HIDDEN)
    up_NF = checkpoint_name(x_ND @ self.up[...], remat.HIDDEN)
    return ((jax.nn.silu(gate_NF) * up_NF) @ self.down[...]).reshape(y_BTD.shape), None


class MixtureOfFFN(nnx.Module):
  """`sum over the top-k of p_i FFN_i(y)` with p the softmax over all the experts."""

  def __init__(
    self, model: config.Model, layout: Layout, decoding: bool = False, *, rngs: nnx.Rngs
  ):
    """Parameters of all the layers: `gate` and `up` LEDF, `down` LEFD, `router` LDE.

    With `expert_bias` in the options that too, LE. `decoding` is as in `Block`.
    """
    L, D, F = model.num_layers, model.d_model, model.ffn_dim
    self.options = model.ffn_experts
    self.layout, self.decoding = layout, decoding
    E = self.options.num_experts
    self.gate = parameters.normal(rngs, (L, E, D, F), D)
    self.up = parameters.normal(rngs, (L, E, D, F), D)
    self.down = parameters.normal(rngs, (L, E, F, D), F, (2 * L) ** -0.5)
    self.router = parameters.normal(rngs, (L, D, E), D)
    if self.options.expert_bias:
      self.expert_bias = parameters.full((L, E), 0)

  def __call__(self, y_BTD: jax.Array, tokens: Tokens) -> tuple[jax.Array, router.Choices]:
    """One layer's mixture of normalised tokens (B, T, D), as far as this device's experts go."""
    num_experts, k = self.gate.shape[0], self.options.top_k
    gates_BTE, logits_BTE = router.gates(y_BTD, self.router[...])
    bias_E = self.expert_bias[...] if self.options.expert_bias else None
    gates_BTk, experts_BTk, chosen_BTE = router.top_k(
      gates_BTE, k, self.options.renormalize, bias_E
    )
    # Padding, and what other devices' experts compute, is assigned to no expert here.
    experts_BTk = self.layout.local_numbers(experts_BTk, num_experts)
    experts_A = jnp.where(tokens.real_BT[..., None], experts_BTk, num_experts).reshape(-1)
    x_AD = jnp.repeat(y_BTD.astype(self.gate.dtype).reshape(-1, y_BTD.shape[-1]), k, axis=0)
    output_AD, dropped = self.experts(x_AD, experts_A)
    output_BTkD = checkpoint_name(output_AD, remat.EXPERT_OUTPUTS).reshape(*gates_BTk.shape, -1)
    output_BTD = jnp.einsum('btkd,btk->btd', output_BTkD, gates_BTk.astype(output_AD.dtype))
    return output_BTD, router.Choices(gates_BTE, logits_BTE, chosen_BTE, dropped)

  def experts(self, x_AD: jax.Array, experts_A: jax.Array) -> tuple[jax.Array, jax.Array]:
    """SwiGLU of each assignment by its expert, and the number of assignments that were dropped."""
    weights = self.gate[...], self.up[...], self.down[...]
    if self.options.capacity_factor:
      even_share = experts_A.size / self.options.num_experts
      rows = min(math.ceil(self.options.capacity_factor * even_share), experts_A.size)
      return with_capacity(x_AD, experts_A, weights, rows)
    none_dropped, platform = jnp.zeros((), jnp.int32), self.layout.platform
    if self.decoding and (platform != 'tpu' or experts_A.size <= few.BLOCK_ROWS):
      return few.swiglu(x_AD, experts_A, weights, platform), none_dropped
    num_experts = self.options.num_experts
    return grouped.swiglu(x_AD, experts_A, weights, num_experts, platform), none_dropped


def with_capacity(x_AD, experts_A, weights, rows: int) -> tuple[jax.Array, jax.Array]:
  """SwiGLU with a buffer of `rows` rows for each expert; assignments that do not fit are dropped.

  Returns:
    (A, D), zeros for what was dropped; the number of those, int32.
  """
  gate_EDF, up_EDF, down_EFD = weights
  slots = dispatch.buffers(experts_A, gate_EDF.shape[0], rows)
  x_SD = dispatch.permute(x_AD, slots)
  x_ERD = x_SD.reshape(-1, rows, x_AD.shape[-1])
  hidden_ERF = jax.nn.silu(jnp.einsum('erd,edf->erf', x_ERD, gate_EDF))
  hidden_ERF *= jnp.einsum('erd,edf->erf', x_ERD, up_EDF)
  output_SD = jnp.einsum('erf,efd->erd', hidden_ERF, down_EFD).reshape(x_SD.shape)
  dropped = jnp.sum(jnp.maximum(slots.sizes - rows, 0), dtype=jnp.int32)
  return dispatch.unpermute(output_SD, slots), dropped
