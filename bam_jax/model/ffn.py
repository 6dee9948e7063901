"""SwiGLU, dense and as a mixture of routed experts.

Legend: B batch, T sequence, D model, F hidden, E experts, k experts a token visits, P = BTk pairs,
S rows of the experts' buffer, R rows of one expert's part.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from bam_jax import config
from bam_jax.model import dispatch, parameters, remat, router
from bam_jax.model.kernels import grouped
from bam_jax.model.tokens import Tokens
from bam_jax.parallel.collectives import Layout


def swiglu(x: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
  """`(silu(x W_gate) * (x W_up)) W_down` of (..., D); arXiv 2002.05202."""
  # As a matrix: XLA's backward pass on CPU takes three times as long for more dimensions.
  x_ND = x.reshape(-1, x.shape[-1])
  gate_NF = checkpoint_name(x_ND @ gate_DF, remat.HIDDEN)
  up_NF = checkpoint_name(x_ND @ up_DF, remat.HIDDEN)
  return ((jax.nn.silu(gate_NF) * up_NF) @ down_FD).reshape(x.shape)


class FFN(nnx.Module):
  """Dense SwiGLU."""

  def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
    """Parameters of all the layers: `gate` and `up` LDF, `down` LFD."""
    L, D, F = model.num_layers, model.d_model, model.ffn_dim
    self.gate = parameters.normal(rngs, (L, D, F), D)
    self.up = parameters.normal(rngs, (L, D, F), D)
    self.down = parameters.normal(rngs, (L, F, D), F, (2 * L) ** -0.5)

  def __call__(self, y_BTD: jax.Array, tokens: Tokens) -> tuple[jax.Array, None]:
    """One layer's FFN of normalised tokens (B, T, D), and no statistics."""
    return swiglu(y_BTD.astype(self.gate.dtype), self.gate[...], self.up[...], self.down[...]), None


class MixtureOfFFN(nnx.Module):
  """`sum over the top-k of p_i FFN_i(y)` with p the softmax over all the experts."""

  def __init__(self, model: config.Model, layout: Layout, *, rngs: nnx.Rngs):
    """Parameters of all the layers: `gate` and `up` LEDF, `down` LEFD, `router` LDE.

    With a bias that balances, `expert_bias` LE too.
    """
    L, D, F = model.num_layers, model.d_model, model.ffn_dim
    self.options = model.ffn_experts
    self.layout = layout
    E = self.options.num_experts
    self.gate = parameters.normal(rngs, (L, E, D, F), D)
    self.up = parameters.normal(rngs, (L, E, D, F), D)
    self.down = parameters.normal(rngs, (L, E, F, D), F, (2 * L) ** -0.5)
    self.router = parameters.normal(rngs, (L, D, E), D)
    if self.options.expert_bias:
      self.expert_bias = parameters.zeros((L, E))
    self.choose = _choose(self.options)
    self.statistics = router.statistics  # what is reported; an observer puts its own here
    self.experts = _experts(self.options, layout.platform)

  def __call__(self, y_BTD: jax.Array, tokens: Tokens) -> tuple[jax.Array, router.Statistics]:
    """One layer's mixture of normalised tokens (B, T, D), as far as this device's experts go.

    Padding visits no expert and takes no room in a buffer.
    """
    num_experts, k = self.gate.shape[0], self.options.top_k
    gates_BTE, logits_BTE = router.gates(y_BTD, self.router[...])
    gates_BTk, experts_BTk, chosen_BTE = self.choose(self, gates_BTE)
    stats = self.statistics(gates_BTE, logits_BTE, chosen_BTE, tokens.counted_BT)

    experts_BTk = self.layout.my_numbers(experts_BTk, num_experts)
    experts_P = jnp.where(tokens.real_BT[..., None], experts_BTk, num_experts).reshape(-1)
    x_PD = jnp.repeat(y_BTD.astype(self.gate.dtype).reshape(-1, y_BTD.shape[-1]), k, axis=0)
    weights = self.gate[...], self.up[...], self.down[...]
    output_PD, dropped = self.experts(x_PD, experts_P, weights)
    # The gates' gradient needs it.
    output_BTkD = checkpoint_name(output_PD, remat.CHOICES).reshape(*gates_BTk.shape, -1)
    output_BTD = jnp.einsum('btkd,btk->btd', output_BTkD, gates_BTk.astype(output_PD.dtype))
    return output_BTD, stats._replace(dropped=dropped.astype(jnp.int32))


def _choose(options: config.FFNExperts) -> Callable:
  """How the top-k are chosen: (module, gates BTE) -> what `router.choose` returns."""
  k, renormalize = options.top_k, options.renormalize
  if options.expert_bias:
    return lambda m, gates: router.choose_biased(gates, m.expert_bias[...], k, renormalize)
  return lambda m, gates: router.choose(gates, k, renormalize)


def _experts(options: config.FFNExperts, platform: str) -> Callable:
  """How the experts compute: (rows PD, expert of each P, weights) -> (rows PD, dropped pairs)."""
  if options.capacity_factor:
    return _buffered(options.num_experts, options.capacity_factor)
  return _dropless(grouped.choose(platform), options.num_experts)


def _buffered(all_experts: int, factor: float) -> Callable:
  """One buffer an expert, `factor` times its even share; pairs that do not fit are dropped."""

  def run(x_PD, experts_P, weights):
    num_experts = weights[0].shape[0]
    rows = min(math.ceil(factor * experts_P.size / all_experts), experts_P.size)
    slots = dispatch.buffers(experts_P, num_experts, rows)
    x_SD = dispatch.move(x_PD, slots.pair_of_slot, slots.slot_of_pair)
    x_ERD = x_SD.reshape(num_experts, rows, -1)
    gate_EDF, up_EDF, down_EFD = weights
    hidden_ERF = jax.nn.silu(jnp.einsum('erd,edf->erf', x_ERD, gate_EDF))
    hidden_ERF *= jnp.einsum('erd,edf->erf', x_ERD, up_EDF)
    output_SD = jnp.einsum('erf,efd->erd', hidden_ERF, down_EFD).reshape(x_SD.shape)
    dropped = jnp.sum(jnp.maximum(slots.sizes - rows, 0))
    return dispatch.move(output_SD, slots.slot_of_pair, slots.pair_of_slot), dropped

  return run


ROOM = 2  # over an even load, of the buffer that usually suffices


def _dropless(kernel: grouped.Kernel, all_experts: int) -> Callable:
  """A buffer in which every pair finds room, computed as far as it is filled."""

  def run(x_PD, experts_P, weights):
    num_experts, pairs = weights[0].shape[0], experts_P.size
    slots = dispatch.blocks(experts_P, num_experts, min(kernel.rows, pairs))
    usual = math.ceil(ROOM * pairs * num_experts / all_experts)
    return kernel.swiglu(usual, x_PD, weights, slots), jnp.zeros((), jnp.int32)

  return run
