"""FFN, dense and as a mixture of routed experts.

Legend: B batch, T sequence, D model, F hidden, E experts, k experts a token visits, A = BTk
assignments of a token to an expert, N tokens, R rows of one expert's buffer.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bam_jax import config
from bam_jax.model import activation, dispatch, parameters, remat, router
from bam_jax.model.activation import Weights
from bam_jax.model.kernels import few, grouped
from bam_jax.model.kernels.cached import LayerCache
from bam_jax.model.rope import Tokens
from bam_jax.parallel.collectives import Layout


class FFN(nnx.Module):
  """Dense FFN, such as SwiGLU: `(silu(x W_gate) * (x W_up)) W_down`; arXiv 2002.05202."""

  def __init__(
    self, model: config.Model, layout: Layout, decoding: bool = False, *, rngs: nnx.Rngs
  ):
    """Parameters of all the layers: `gate`, but for 'gelu', and `up` L[E]DF, `down` L[E]FD.

    With experts `router` LDE, and with `expert_bias` in their options that too, LE; biases
    `gate_bias` and `up_bias` L[E]F, `down_bias` L[E]D. `decoding` is as in `Block`.
    """
    L, D, F = model.num_layers, model.d_model, model.ffn_dim
    self.options = options = model.ffn_experts
    self.model, self.layout, self.decoding = model, layout, decoding
    E = (options.num_experts,) if options else ()
    for name in model.ffn_inputs:
      setattr(self, name, parameters.normal(rngs, (L, *E, D, F), D))
    self.down = parameters.normal(rngs, (L, *E, F, D), F, (2 * L) ** -0.5)
    if options:
      self.router = parameters.normal(rngs, (L, D, *E), D)
      if options.expert_bias:
        self.expert_bias = parameters.full((L, *E), 0)
    if model.biases == 'all':
      for name in model.ffn_inputs:
        setattr(self, f'{name}_bias', parameters.full((L, *E, F), 0))
      self.down_bias = parameters.full((L, *E, D), 0)

  @property
  def weights(self) -> Weights:
    """One layer's arrays."""
    arrays = lambda end: tuple(getattr(self, name + end)[...] for name in self.model.ffn_inputs)
    biases = arrays('_bias') if self.model.biases == 'all' else ()
    return Weights(arrays(''), self.down[...], biases, self.model.ffn)

  def __call__(
    self, y_BTD: jax.Array, tokens: Tokens, cache: LayerCache | None = None
  ) -> tuple[jax.Array, router.Assignments | None, LayerCache | None]:
    """One layer's FFN of normalised tokens (B, T, D), its router's assignments, and the cache."""
    # As a matrix: XLA's backward pass on CPU takes three times as long for more dimensions.
    x_ND = y_BTD.astype(self.up.dtype).reshape(-1, y_BTD.shape[-1])
    weights = self.weights
    products = weights.biased([x_ND @ into_DF for into_DF in weights.into])
    products = [checkpoint_name(x_NF, remat.HIDDEN) for x_NF in products]
    output_ND = weights.hidden(*products) @ weights.down
    if weights.biases:
      output_ND += self.layout.once(self.down_bias[...], 'tensor')
    return output_ND.reshape(y_BTD.shape), None, cache


class MixtureOfFFN(FFN):
  """`sum over the top-k of p_i FFN_i(y)` with p the softmax over all the experts."""

  def __call__(self, y_BTD, tokens, cache=None):
    """What `FFN` returns, as far as the experts on this device go."""
    num_experts, k = self.up.shape[0], self.options.top_k
    gates_BTE, logits_BTE, sum_BE = router.gates(
      self.model, y_BTD, self.router[...], tokens, cache and cache.ffn_sum
    )
    cache = cache and cache._replace(ffn_sum=sum_BE)
    bias_E = self.expert_bias[...] if self.options.expert_bias else None
    gates_BTk, experts_BTk, chosen_BTE = router.top_k(
      gates_BTE, k, self.options.renormalize, bias_E
    )
    # Padding, and what other devices' experts compute, is assigned to no expert here.
    experts_BTk = self.layout.local_numbers(experts_BTk, num_experts, self.options.num_experts)
    experts_A = jnp.where(tokens.real_BT[..., None], experts_BTk, num_experts).reshape(-1)
    x_AD = jnp.repeat(y_BTD.astype(self.up.dtype).reshape(-1, y_BTD.shape[-1]), k, axis=0)
    output_AD, dropped = self.experts(x_AD, experts_A)
    output_BTkD = checkpoint_name(output_AD, remat.EXPERT_OUTPUTS).reshape(*gates_BTk.shape, -1)
    output_BTD = jnp.einsum('btkd,btk->btd', output_BTkD, gates_BTk.astype(output_AD.dtype))
    return output_BTD, router.Assignments(gates_BTE, logits_BTE, chosen_BTE, dropped), cache

  def experts(self, x_AD: jax.Array, experts_A: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each assignment by its expert, (A, D), and the number of assignments that were dropped."""
    options, weights, platform = self.options, self.weights, self.layout.platform
    dropped = jnp.zeros((), jnp.int32)
    if options.capacity_factor:
      even_share = experts_A.size / options.num_experts
      rows = min(math.ceil(options.capacity_factor * even_share), experts_A.size)
      slots = dispatch.buffers(experts_A, self.up.shape[0], rows)
      output_AD = with_capacity(x_AD, weights, slots)
      dropped = jnp.sum(jnp.maximum(slots.sizes - rows, 0), dtype=jnp.int32)
    elif self.decoding and (platform != 'tpu' or experts_A.size <= few.BLOCK_ROWS):
      few_rows = few.visit if platform == 'tpu' else few.loop
      output_AD = few_rows(x_AD, experts_A, weights)
    else:
      output_AD = grouped.ffn(x_AD, experts_A, weights, options.num_experts, platform)
    if weights.biases:
      if options.capacity_factor:
        kept_A = slots.slot_of_assignment < slots.assignment_of_slot.size
        experts_A = jnp.where(kept_A, experts_A, self.up.shape[0])
      bias_ED = self.layout.once(self.down_bias[...], *self.layout.hidden_axes)
      output_AD += activation.bias_rows(bias_ED, experts_A)
    return output_AD, dropped


def with_capacity(x_AD: jax.Array, weights: Weights, slots: dispatch.Slots) -> jax.Array:
  """Every expert on the rows of its buffer, (A, D); zeros for what has no slot."""
  x_SD = dispatch.permute(x_AD, slots)
  x_ERD = x_SD.reshape(slots.sizes.size, -1, x_AD.shape[-1])
  products = [jnp.einsum('erd,edf->erf', x_ERD, into_EDF) for into_EDF in weights.into]
  hidden_ERF = weights.hidden(*weights.biased(products, lambda bias_EF: bias_EF[:, None]))
  output_SD = jnp.einsum('erf,efd->erd', hidden_ERF, weights.down).reshape(x_SD.shape)
  return dispatch.unpermute(output_SD, slots)
