"""The whole model: Flax modules underneath, plain functions of a parameter dictionary on top."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bam_jax import config
from bam_jax.model import attention, block, parameters, remat, vocabulary
from bam_jax.model.kernels import attention as kernels
from bam_jax.model.tokens import Tokens
from bam_jax.parallel.collectives import Layout

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

  def __init__(
    self, model: config.Model, compute: config.Compute, layout: Layout, *, rngs: nnx.Rngs
  ):
    self.model = model
    self.compute = compute
    self.layout = layout
    dtype = jnp.dtype(compute.dtype)
    self.kernel = kernels.choose(layout.platform, dtype, model.head_dim)
    self.embed = Table(model, rngs=rngs)
    self.blocks = block.Block(model, layout, rngs=rngs)
    self.final_norm = block.LayerNorm((model.d_model,), model.norm_epsilon)
    if not model.tied_embeddings:
      self.unembed = Kernel(model, rngs=rngs)

  def __call__(self, tokens_BT, segments_BT, positions_BT) -> tuple[jax.Array, block.Routing]:
    """Hidden states after the final norm (B, T, D), and the routers' statistics of every layer."""
    dtype = jnp.dtype(self.compute.dtype)
    x_BTD = vocabulary.embed(self.layout, self.embed.table[...], tokens_BT, dtype)
    tokens = self.tokens(segments_BT, positions_BT)
    graph, layers = nnx.split(self.blocks)

    @remat.wrap(self.compute.remat, self.layout.gathers)
    def layer(x_BTD, params):
      block = nnx.merge(graph, self.layout.weights(params, 'blocks'))
      return block(x_BTD, tokens)

    layers = nnx.to_pure_dict(layers)
    x_BTD, routing = jax.lax.scan(layer, x_BTD, layers, unroll=self.compute.unroll)
    return self.final_norm(x_BTD), routing

  def tokens(self, segments_BT, positions_BT) -> dict[str, Tokens]:
    """What the blocks need to know of this device's own tokens, and of its group's."""
    made = {}
    for scope, gather in (('own', lambda x: x), ('group', self.layout.group)):
      segments, positions = gather(segments_BT), gather(positions_BT)
      dtype = jnp.dtype(self.compute.dtype)
      real_BT = segments > 0
      made[scope] = Tokens(
        turn=attention.rotary(positions, self.model.head_dim, self.model.rope_theta, dtype),
        attend=self.kernel(segments),
        real_BT=real_BT,
        counted_BT=self.layout.own(real_BT) if scope == 'group' else real_BT,
      )
    return made


class Network:
  """A model as functions of its parameters; everything about shapes is decided here, once.

  On a mesh `hidden` and `nll_sum` are a device's part, to be called inside `layout.spread`.
  """

  def __init__(
    self, model: config.Model, compute: config.Compute, mesh: jax.sharding.Mesh | None = None
  ):
    self.model = model
    self.compute = compute
    self.layout = Layout(mesh)
    self._dtype = jnp.dtype(compute.dtype)
    self._graph, self._abstract = nnx.split(nnx.eval_shape(self._build))

  def _build(self, key: jax.Array | None = None) -> Transformer:
    key = jax.random.key(0) if key is None else key
    rngs = nnx.Rngs(params=key)
    return Transformer(self.model, self.compute, self.layout, rngs=rngs)

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
    # Casting the whole tree first lets a sharded weight travel in the compute dtype. The table is
    # cast where its rows are read.
    cast = parameters.cast(params, self._dtype) | {'embed': params['embed']}
    return nnx.merge(self._graph, cast)(tokens_BT, segments_BT, positions_BT)

  def logits(self, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """Scores of the next token, (..., V), float32 sums of products in the compute dtype, scaled."""
    kernel, transposed = self._unembedding(params)
    dtype = jnp.promote_types(self._dtype, jnp.float32)
    return self.model.logit_scale * jnp.einsum(
      '...d,dv->...v' if transposed else '...d,vd->...v',
      hidden_BTD.astype(self._dtype),
      kernel.astype(self._dtype),
      preferred_element_type=dtype,
    )

  def nll_sum(self, params: Params, hidden_BTD, targets_BT, weights_BT) -> jax.Array:
    """Sum of weight times negative log-likelihood of the targets; float32 nats.

    Args:
      params: float32.
      hidden_BTD: what `hidden` returned.
      targets_BT: int32.
      weights_BT: float32.
    """
    kernel, transposed = self._unembedding(params)
    return vocabulary.nll_sum(
      self.layout,
      kernel,
      hidden_BTD,
      targets_BT,
      weights_BT,
      transposed=transposed,
      scale=self.model.logit_scale,
      chunk=self.compute.loss_chunk,
      dtype=self._dtype,
    )

  def _unembedding(self, params: Params) -> tuple[jax.Array, bool]:
    """The output embedding, and whether it is DV and not VD."""
    if self.model.tied_embeddings:
      return params['embed']['table'], False
    return params['unembed']['kernel'], True
