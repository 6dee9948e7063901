"""The program that scores: of every token of some rows its likelihood and where it was routed.

Every row is computed whole on one device. A mesh's `data` axis repeats the weights; whatever else
it has cuts them, to be gathered a layer at a time: all are `fsdp` here. So a row's numbers are
those of one device, whatever the mesh.

Legend: B rows, T tokens that are read, S = T + 1, D model, V vocabulary, L layers, E experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.model import block, transformer
from bam_jax.parallel import sharding

LOGITS = 2**25  # of a device that exist at once, float32


class Choices(NamedTuple):
  """What one router did with each token; after the scan over layers with a leading axis L."""

  gate_BTE: jax.Array  # of all the experts, before the top-k
  load_BTE: jax.Array  # share of the token that went to expert i: gates if soft, else choices / k
  dropped: jax.Array  # (): 0, nothing is dropped


class Scores(NamedTuple):
  """Of the token that follows each one that was read."""

  nll_BT: jax.Array  # negative log-likelihood, nats
  greedy_BT: jax.Array  # whether it is the most probable one
  routing: block.Routing  # of the tokens that were read: `Choices`, or None without such a router


class Watched(transformer.Network):
  """The model, whose routers return `Choices` in place of sums over the batch."""

  def _build(self, key=None) -> transformer.Transformer:
    made = super()._build(key)
    for part in (made.blocks.attention, made.blocks.ffn):
      if hasattr(part, 'statistics'):
        part.statistics = _choices
    return made


def _choices(gates_BTE, logits_BTE, chosen_BTE, counted_BT) -> Choices:
  del logits_BTE, counted_BT
  if chosen_BTE is None:
    load_BTE = gates_BTE
  else:
    load_BTE = chosen_BTE / chosen_BTE.sum(-1, keepdims=True)
  return Choices(gates_BTE, load_BTE, jnp.zeros((), gates_BTE.dtype))


def rows_mesh(mesh: config.Mesh) -> config.Mesh:
  """The same devices with rows along all of them, and weights cut along all but `data`."""
  return config.Mesh(data=mesh.data, fsdp=mesh.fsdp * mesh.expert * mesh.tensor)


def dropless(model: config.Model) -> config.Model:
  """The model without room that runs out: what a token gets must not depend on its neighbours."""
  if model.ffn_experts is None:
    return model
  experts = dataclasses.replace(model.ffn_experts, capacity_factor=0.0)
  return dataclasses.replace(model, ffn_experts=experts)


@functools.lru_cache(maxsize=8)
def score(
  model: config.Model, dtype: str, mesh: jax.sharding.Mesh
) -> Callable[[transformer.Params, jax.Array, jax.Array], Scores]:
  """The jitted `(params, tokens BS int32, length B int32) -> Scores` of global arrays.

  Args:
    model: `dropless`, any variant.
    dtype: of activations and matrices; likelihoods are float32.
    mesh: of `rows_mesh`.
  """
  network = Watched(model, config.Compute(dtype=dtype), mesh)
  layout = network.layout

  def run(params, tokens_BS, length_B):
    inputs_BT, targets_BT = tokens_BS[:, :-1], tokens_BS[:, 1:]
    position_T = jnp.arange(inputs_BT.shape[1])
    real_BT = position_T < length_B[:, None]
    hidden_BTD, routing = network.hidden(
      params, inputs_BT, real_BT.astype(jnp.int32), jnp.broadcast_to(position_T, inputs_BT.shape)
    )
    whole = _unembedding(network, params)

    def one(pair):
      hidden_D, target = pair
      logits_V = network.logits(whole, hidden_D)
      nll = jax.nn.logsumexp(logits_V) - logits_V[target]
      return nll, logits_V.argmax() == target

    flat = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), targets_BT.reshape(-1)
    chunk = max(1, LOGITS // model.vocab_size)
    nll_N, greedy_N = jax.lax.map(one, flat, batch_size=chunk)
    return Scores(nll_N.reshape(real_BT.shape), greedy_N.reshape(real_BT.shape), routing)

  rows, of_layers = sharding.BATCH, P(None, *sharding.BATCH)
  routers = [
    experts and Choices(of_layers, of_layers, P())
    for experts in (model.attention_experts, model.ffn_experts)
  ]
  specs = layout.specs(network.abstract()), rows, rows
  return jax.jit(layout.spread(run, specs, Scores(rows, rows, block.Routing(*routers))))


def _unembedding(network: transformer.Network, params: Any) -> dict:
  """The output embedding of all words, as part of a tree of parameters."""
  name, leaf, axis = (
    ('embed', 'table', 0) if network.model.tied_embeddings else ('unembed', 'kernel', 1)
  )
  part = params[name][leaf].astype(network.compute.dtype)
  return {name: {leaf: network.layout.gather(part, 'fsdp', dimension=axis)}}
