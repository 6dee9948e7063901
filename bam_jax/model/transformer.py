"""The whole model: Flax modules underneath, plain functions of a parameter dictionary on top."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bam_jax import config
from bam_jax.model import attention, block, parameters

Params = dict[str, Any]  # nested, as the layout in docs: layers on axis 0, experts on axis 1


class Table(nnx.Module):
  """Input embedding: `table` VD."""

  def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
    self.table = parameters.normal(rngs, (model.vocab_size, model.d_model), model.d_model)


class Kernel(nnx.Module):
  """Output embedding of a model that does not tie it: `kernel` DV."""

  def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
    self.kernel = parameters.normal(rngs, (model.d_model, model.vocab_size), model.d_model)


class Transformer(nnx.Module):
  """Embedding, a scan over the blocks, a final norm, and the output embedding."""

  def __init__(self, model: config.Model, compute: config.Compute, *, rngs: nnx.Rngs):
    self.model = model
    self.compute = compute
    self.embed = Table(model, rngs=rngs)
    self.blocks = block.Block(model, rngs=rngs)
    self.final_norm = block.LayerNorm((model.d_model,), model.norm_epsilon)
    if not model.tied_embeddings:
      self.unembed = Kernel(model, rngs=rngs)

  def __call__(self, tokens_BT, segments_BT, positions_BT) -> tuple[jax.Array, block.Routing]:
    """Hidden states after the final norm (B, T, D), and the routers' statistics of every layer."""
    x_BTD = self.embed.table[tokens_BT]
    turn = attention.rotary(
      positions_BT, self.model.head_dim, self.model.rope_theta, self.embed.table.dtype
    )
    attend = attention.plain(segments_BT)
    graph, layers = nnx.split(self.blocks)

    def layer(x_BTD, params):
      return nnx.merge(graph, params)(x_BTD, turn, attend, segments_BT > 0)

    if self.compute.remat == 'full':
      layer = jax.checkpoint(layer)
    x_BTD, routing = jax.lax.scan(layer, x_BTD, layers, unroll=self.compute.unroll)
    return self.final_norm(x_BTD), routing


class Network:
  """A model as functions of its parameters; everything about shapes is decided here, once."""

  def __init__(self, model: config.Model, compute: config.Compute):
    self.model = model
    self.compute = compute
    self._dtype = jnp.dtype(compute.dtype)
    self._graph, self._abstract = nnx.split(nnx.eval_shape(self._build))

  def _build(self, key: jax.Array | None = None) -> Transformer:
    key = jax.random.key(0) if key is None else key
    return Transformer(self.model, self.compute, rngs=nnx.Rngs(params=key))

  def init(self, key: jax.Array) -> Params:
    """Random float32 parameters."""
    return nnx.to_pure_dict(nnx.state(self._build(key)))

  def abstract(self) -> Params:
    """Shapes and dtypes of the parameters."""
    return nnx.to_pure_dict(self._abstract)

  def hidden(
    self, params: Params, tokens_BT, segments_BT, positions_BT
  ) -> tuple[jax.Array, block.Routing]:
    """Hidden states after the final norm, and what the routers did.

    Args:
      params: float32.
      tokens_BT: int32.
      segments_BT: int32, the document of a token within its row; 0 is padding.
      positions_BT: int32, the position of a token within its document.

    Returns:
      (B, T, D) float32, and sums over the batch's tokens with a leading axis L.
    """
    # Casting the whole tree first lets a sharded weight travel in the compute dtype.
    transformer = nnx.merge(self._graph, parameters.cast(params, self._dtype))
    return transformer(tokens_BT, segments_BT, positions_BT)

  def logits(self, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """Scores of the next token, (..., V), float32 sums of products in the compute dtype, scaled."""
    if self.model.tied_embeddings:
      kernel_VD, spec = params['embed']['table'], '...d,vd->...v'
    else:
      kernel_VD, spec = params['unembed']['kernel'], '...d,dv->...v'
    dtype = jnp.promote_types(self._dtype, jnp.float32)
    return self.model.logit_scale * jnp.einsum(
      spec,
      hidden_BTD.astype(self._dtype),
      kernel_VD.astype(self._dtype),
      preferred_element_type=dtype,
    )
