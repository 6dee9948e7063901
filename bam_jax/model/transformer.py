"""The whole model: Flax modules underneath, functions of a nested dict of arrays on top."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from bam_jax import config
from bam_jax.model import parameters, remat, rope, router, vocabulary
from bam_jax.model.block import Block, Routing
from bam_jax.model.norm import Norm
from bam_jax.parallel.collectives import Layout

Params = dict[str, Any]  # nested; layers on axis 0, experts on axis 1
Collect = Literal['statistics', 'assignments'] | Callable[[jax.Array, rope.Tokens, jax.Array], Any]


class Transformer(nnx.Module):
  """Embedding, a scan over the blocks, a final norm, and the output embedding."""

  def __init__(
    self, model: config.Model, compute: config.Compute, layout: Layout, *, rngs: nnx.Rngs
  ):
    """Parameters: `embed/table` VD, `blocks`, `final_norm` and, untied, `unembed/kernel` DV.

    With `embedding_rank` these are V(D+X) and (D+X)V, and there are `embed/router` DE,
    `embed/directions` XD and, untied, `unembed/directions` XD; see `vocabulary.mixed`.
    """
    self.model, self.compute, self.layout = model, compute, layout
    V, D, X = model.vocab_size, model.d_model, model.embedding_columns
    self.embed, self.unembed = nnx.Module(), nnx.Module()
    self.embed.table = parameters.normal(rngs, (V, D + X), D)
    self.blocks = Block(model, layout, rngs=rngs)
    self.final_norm = Norm((D,), model)
    if not model.tied_embeddings:
      self.unembed.kernel = parameters.normal(rngs, (D + X, V), D)
    if X:
      self.embed.router = parameters.normal(rngs, (D, model.ffn_experts.num_experts), D)
      for end in (self.embed,) if model.tied_embeddings else (self.embed, self.unembed):
        end.directions = parameters.normal(rngs, (X, D), D)

  def __call__(
    self, tokens_BT, segments_BT, positions_BT, collect: Collect = 'statistics'
  ) -> tuple[jax.Array, Routing]:
    """What `hidden` says."""
    layout, dtype = self.layout, jnp.dtype(self.compute.dtype)
    x_BTD = vocabulary.embed(layout, self.embed.table[...], tokens_BT, dtype)
    x_BTD *= jnp.asarray(self.model.embedding_scale, dtype)
    here = rope.metadata(segments_BT, positions_BT, self.model, dtype)
    arrays = layout.gather_tokens(segments_BT), layout.gather_tokens(positions_BT)
    gathered = rope.metadata(*arrays, self.model, dtype)
    counted_BT = layout.mask_gathered(gathered.real_BT)  # each token once, on its owner
    # Which tokens a part reads here: the gathered, or this device's.
    experts = self.model.soft_attention, self.model.ffn_experts
    read = [(gathered, counted_BT) if part else (here, here.real_BT) for part in experts]
    travelling = '' if self.model.soft_attention else 'blocks/attention'
    graph, layers = nnx.split(self.blocks)
    layers = nnx.to_pure_dict(layers)
    if mixed := self.model.embedding_columns:
      embed = nnx.to_pure_dict(nnx.state(self.embed))
      first_norm = jax.tree.map(lambda x: x[0], layers.get('norm'))
      x_BTD, gates_BTX, _ = vocabulary.mixed(self.model, x_BTD, embed, first_norm, here)
    kind_L = rope.kind_of_layer(self.model)

    def layer(x_BTD, params_and_kind):
      params, kind = params_and_kind
      tokens = [dataclasses.replace(part, kind=kind) for part in (here, gathered)]
      block = nnx.merge(graph, layout.weights(params, 'blocks', travelling))
      x_BTD, routing, _ = block(x_BTD, *tokens, keep_inputs=callable(collect))
      if callable(collect):
        routing = Routing(*(collect(y_BTD, *of) for y_BTD, of in zip(routing, read)))
      if collect == 'statistics':
        routing = Routing(*(c and router.statistics(c, of[1]) for c, of in zip(routing, read)))
      return x_BTD, routing

    kind = self.compute.remat
    if kind == 'auto':
      kind = 'matmuls' if layout.gathers else 'none'
    # Where no weights are gathered, 'none' saves what is elementwise too: such a model has memory.
    if kind != 'none' or layout.gathers:
      layer = remat.checkpoint(layer, kind)
    layers = layers, jnp.asarray(kind_L) if kind_L else None
    x_BTD, collected = jax.lax.scan(layer, x_BTD, layers, unroll=self.compute.unroll)
    hidden_BTD = self.final_norm(x_BTD)
    if mixed:
      end = self.embed if self.model.tied_embeddings else self.unembed
      hidden_BTD = vocabulary.widened(hidden_BTD, gates_BTX, end.directions[...], dtype)
    return hidden_BTD, collected


class Network:
  """A model as functions of its parameters.

  On a mesh `hidden` and `nll_sum` are one device's part, to be called inside `layout.spread`.
  """

  def __init__(
    self, model: config.Model, compute: config.Compute, mesh: jax.sharding.Mesh | None = None
  ):
    self.model, self.compute = model, compute
    self.layout = Layout(mesh)
    self._dtype = jnp.dtype(compute.dtype)
    self._graph, self._abstract = nnx.split(nnx.eval_shape(self._make))

  def init(self, key: jax.Array) -> Params:
    """Random float32 parameters."""
    return nnx.to_pure_dict(nnx.state(self._make(key)))

  def _make(self, key: jax.Array | int = 0) -> Transformer:
    return Transformer(self.model, self.compute, self.layout, rngs=nnx.Rngs(params=key))

  def abstract(self) -> Params:
    """Shapes and dtypes of the parameters."""
    return nnx.to_pure_dict(self._abstract)

  def hidden(
    self, params: Params, tokens_BT, segments_BT, positions_BT, collect: Collect = 'statistics'
  ) -> tuple[jax.Array, Routing]:
    """Hidden states after the final norm, and something of every layer.

    Args:
      params: float32.
      tokens_BT: int32.
      segments_BT: int32, the document of a token within its row; 0 is padding.
      positions_BT: int32, the position of a token within its document.
      collect: 'statistics' of the routers, sums over the tokens; 'assignments' of each token;
        or, of a dense model or sequential blocks, a function of what attention and FFN read, BTD,
        the Tokens that these are, and which of them count on this device, bool BT.

    Returns:
      (B, T, D) float32, with `embedding_rank` as `vocabulary.widened`; Routing of Statistics,
      Assignments or the function's, a leading axis L.
    """
    # Casting the whole tree first lets a sharded weight travel in the compute dtype. The table is
    # cast where its rows are read.
    cast = parameters.cast(params, self._dtype) | {'embed': params['embed']}
    return nnx.merge(self._graph, cast)(tokens_BT, segments_BT, positions_BT, collect)

  def logits(self, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """Scores of the next token (..., V): float32 sums of products in the compute dtype, scaled."""
    kernel = self._unembedding(params).astype(self._dtype)
    return vocabulary.scores(self.model, hidden_BTD.astype(self._dtype), kernel)

  def nll_sum(self, params: Params, hidden_BTD, targets_BT, weights_BT) -> jax.Array:
    """Sum of weight times negative log-likelihood of the int32 targets; float32 nats."""
    arrays = self._unembedding(params), hidden_BTD, targets_BT, weights_BT
    return vocabulary.nll_sum(self.layout, self.model, self.compute, *arrays)

  def _unembedding(self, params: Params) -> jax.Array:
    """The output embedding, VD if it is tied, else DV."""
    if self.model.tied_embeddings:
      return params['embed']['table']
    return params['unembed']['kernel']
