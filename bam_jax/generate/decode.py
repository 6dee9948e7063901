"""The model as a reader of new tokens after those in its KV cache: of prompts, or one at a time.

It is the training model's own block, with other layouts of the weights and attention to a cache.
Rows of a batch end together: shorter ones have padding in front.

A generated token reads every weight once and does little with it, so nothing may be gathered or
copied for it. Each layer's array is a buffer of its own, and so is each expert's: on CPU a slice of
a stack is a copy. On TPU alone a layer's routed experts are one, for their kernels. Over a mesh

- `data` and `fsdp` cut the rows of the batch, and no weight;
- `expert` cuts the attention experts, with their keys and values, the hidden columns of every FFN
  expert (with whole ones most devices would be idle while one reads a token's), and the vocabulary;
- `tensor` cuts heads, hidden columns and the vocabulary, as in training.

Legend: L layers, E experts, B batch, T new tokens, S slots, V vocabulary, W local words.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.model import norm, parameters, rope, transformer, vocabulary
from bam_jax.model.block import Block
from bam_jax.model.kernels.cached import KVCache, LayerCache
from bam_jax.parallel import sharding
from bam_jax.parallel.collectives import Layout

ROWS = P(('data', 'fsdp'))
Cache = list[LayerCache]
_PROJECTIONS = ('blocks/attention/query', 'blocks/attention/out')
Read = Callable[[str, Any], Any]  # (path, index) -> that region of a parameter


class DecodeLayout(Layout):
  """The collectives of generation, under the names that the model calls."""

  hidden_axes = ('tensor', 'expert')

  def __init__(self, mesh: jax.sharding.Mesh | None):
    super().__init__(mesh)
    self.row_shards = self.sizes['data'] * self.sizes['fsdp']
    self.sizes = self.sizes | {'fsdp': 1}  # to the model it is more `data`

  def gather(self, x: jax.Array, *axes: str, dimension: int = 0) -> jax.Array:
    """`x`: tokens lie whole on every device that they concern, and so do weights."""
    return x

  def scatter(self, x: jax.Array, *axes: str, dimension: int = 0) -> jax.Array:
    """The sum of `x` over the devices along the axes."""
    return self.sum(x, *axes)

  def concatenate(self, x: jax.Array, *axes: str, dimension: int = 0) -> jax.Array:
    """The parts of `x` along the axes, such as the scores of words."""
    return super().gather(x, *axes, dimension=dimension)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
  """An array with experts on axis 0 as one array for each expert of a device.

  Inside `Layout.spread` the model uses it like the array. Part i of the E / n on each of n devices
  has shape (n, ...) and holds the experts i, i + E / n, ...
  """

  parts: tuple[jax.Array, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    return len(self.parts), *self.parts[0].shape[1:]

  @property
  def dtype(self) -> jnp.dtype:
    return self.parts[0].dtype

  def __getitem__(self, expert):
    return self if expert is ... else self.parts[expert][0]


class Decoder:
  """A model as a function of its parameters as they lie for generation, and a cache."""

  def __init__(self, model: config.Model, dtype: str, mesh: jax.sharding.Mesh | None):
    """`model` is any variant, and drops no tokens; `dtype` is of weights, activations and cache."""
    model = model.dropless()
    self.model, self.dtype = model, dtype
    self.layout = DecodeLayout(mesh)
    self.network = transformer.Network(model, config.Compute(dtype=dtype))
    self.abstract = self.network.abstract()
    make = lambda: Block(model, self.layout, decoding=True, rngs=nnx.Rngs(params=0))
    self._graph, _ = nnx.split(nnx.eval_shape(make))

  def read(
    self, params: dict, cache: Cache, tokens_BT: jax.Array, first_B: jax.Array, start
  ) -> tuple[jax.Array, Cache]:
    """Reads new tokens, which take the slots from `start` on: one device's part of `layout.spread`.

    `params` is what `place` returned; `tokens_BT`, `start` and `first_B` are int32. What stands
    before slot `first_B` of a row is padding. Returns scores of the token that follows the last one
    (B, V), float32, and the cache with the new tokens.
    """
    positions_BT = start + jnp.arange(tokens_BT.shape[1]) - first_B[:, None]
    segments_BT = (positions_BT >= 0).astype(jnp.int32)
    positions_BT = jnp.maximum(positions_BT, 0)
    cached = dict(start=start, first_B=first_B)
    here = rope.metadata(segments_BT, positions_BT, self.model, self.dtype, **cached)
    x_BTD = vocabulary.embed(self.layout, params['embed']['table'], tokens_BT, self.dtype)
    x_BTD *= jnp.asarray(self.model.embedding_scale, x_BTD.dtype)
    updated, model = [], self.model
    if model.embedding_columns:
      first_norm, sum_BE = params['blocks'][0].get('norm'), cache[-1].ffn_sum
      mixed = vocabulary.mixed(model, x_BTD, params['embed'], first_norm, here, sum_BE)
      x_BTD, gates_BTX, sum_BE = mixed
    # Not a scan: it would copy each layer's slice of the weights, and of the cache, before use.
    kinds = rope.kind_of_layer(self.model) or [None] * self.model.num_layers
    for weights, of_layer, kind in zip(params['blocks'], cache[: len(kinds)], kinds, strict=True):
      tokens = dataclasses.replace(here, kind=kind)
      x_BTD, _, of_layer = nnx.merge(self._graph, weights)(x_BTD, tokens, tokens, of_layer)
      updated.append(of_layer)
    hidden_BD = norm.normalize(self.model, x_BTD[:, -1], **params['final_norm'])
    if model.embedding_columns:
      directions_XD = params['embed' if model.tied_embeddings else 'unembed']['directions']
      hidden_BD = vocabulary.widened(hidden_BD, gates_BTX[:, -1], directions_XD, self.dtype)
      updated.append(LayerCache([], None, sum_BE))
    logits_BW = self.network.logits(params, hidden_BD)
    return self.layout.concatenate(logits_BW, 'tensor', 'expert', dimension=1), updated

  def check(self, where: str) -> None:
    """UserError when an axis of the mesh, which `where` names, does not divide what it cuts."""
    sharding.check_divides(self.abstract, self.layout.sizes, where, _spec)

  def place(self, read: Read) -> dict[str, Any]:
    """Parameters on the devices, a layer and an expert at a time; UserError as in `check`.

    `blocks` becomes a list with a tree for each layer, in which arrays of experts are `Apart`.
    """
    self.check('--mesh')

    def one(path, index, abstract):
      x = np.asarray(read(path, index)).astype(abstract.dtype, copy=False)
      return jax.device_put(x, abstract.sharding)

    return self._arrange(one)

  def abstract_params(self) -> dict[str, Any]:
    """Shapes, dtypes and shardings of what `place` returns."""
    return self._arrange(lambda path, index, abstract: abstract)

  def empty_cache(self, batch: int, slots: int) -> Cache:
    """A cache on the devices with room for so many tokens in each row."""
    zeros = lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding)
    return jax.tree.map(zeros, self.abstract_cache(batch, slots))

  def abstract_cache(self, batch: int, slots: int) -> Cache:
    """Shapes, dtypes and shardings of what `empty_cache` returns."""
    experts, parts, sets = self.model.attention_experts, 1, 1
    if experts and not experts.shared_kv:
      parts = self.layout.sizes['expert']
      sets = experts.num_experts // parts
    shape = parts, batch, self.model.num_kv_heads, slots, self.model.head_dim
    spec = P('expert' if parts > 1 else None, *ROWS, 'tensor')
    x = jax.ShapeDtypeStruct(shape, self.dtype, sharding=self.sharding(spec))
    sums = []
    for part in (experts, self.model.ffn_experts):
      prefix = part and self.model.router_input == 'prefix'
      of_rows = dict(dtype=jnp.float32, sharding=self.sharding(ROWS))
      sums.append(jax.ShapeDtypeStruct((batch, part.num_experts), **of_rows) if prefix else None)
    layers = [LayerCache([KVCache(x, x)] * sets, *sums)] * self.model.num_layers
    # The router of embeddings keeps sums too.
    return layers + [LayerCache([], None, sums[1])] * bool(self.model.embedding_rank)

  def specs(self) -> tuple[dict[str, Any], Cache]:
    """PartitionSpecs of parameters and cache; on one device, which needs none, each is None."""
    trees = self.abstract_params(), self.abstract_cache(self.layout.row_shards, 1)
    return jax.tree.map(lambda x: x.sharding and x.sharding.spec, trees)

  def _arrange(self, make: Callable) -> dict[str, Any]:
    """The tree that `place` describes, of `make(path, index, shape, dtype and sharding)`."""
    layout, map_leaves = self.layout, jax.tree_util.tree_map_with_path

    def one(path, leaf, index, spec):
      shape = np.broadcast_to(np.int8(0), leaf.shape)[index].shape  # a view: no memory
      dtype = parameters.dtype_of(path.rsplit('/', 1)[-1], self.dtype)
      return make(path, index, jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding(P(*spec))))

    def whole(key_path, leaf):
      path = sharding.path_of(key_path)
      return one(path, leaf, (), _spec(path, leaf.ndim))

    def of_layer(layer, key_path, leaf):
      path = f'blocks/{sharding.path_of(key_path)}'
      spec = _spec(path, leaf.ndim)[1:]
      ffn, biases = _of_ffn_experts(path, leaf.ndim), path.endswith('_bias')
      routed = path in _PROJECTIONS and not self.model.soft_attention
      stacked = ffn and biases or layout.platform == 'tpu' and (ffn or routed)
      if stacked or not sharding.has_experts(path, leaf.ndim):
        return one(path, leaf, (layer,), spec)
      count = leaf.shape[1] // (layout.sizes['expert'] if 'expert' in spec[0] else 1)
      indices = [(layer, slice(i, None, count)) for i in range(count)]
      return Apart(tuple(one(path, leaf, index, spec) for index in indices))

    rest = map_leaves(whole, {k: v for k, v in self.abstract.items() if k != 'blocks'})
    layers = range(self.model.num_layers)
    blocks = [map_leaves(partial(of_layer, layer), self.abstract['blocks']) for layer in layers]
    return rest | {'blocks': blocks}

  def sharding(self, spec: P) -> NamedSharding | None:
    """On this mesh; a single device needs none."""
    return NamedSharding(self.layout.mesh, spec) if self.layout.mesh else None


def _spec(path: str, ndim: int) -> tuple[tuple[str, ...], ...]:
  """The axes that cut each dimension of a parameter: those of training that move no weight."""
  if _of_ffn_experts(path, ndim):
    hidden = {'down': 2, 'down_bias': None}.get(path.rsplit('/', 1)[1], ndim - 1)
    return tuple(('tensor', 'expert') if d == hidden else () for d in range(ndim))
  spec = sharding.spec_of(path, ndim)
  by_expert = sharding.has_experts(path, ndim) or path in ('embed/table', 'unembed/kernel')
  kept = ('tensor', 'expert') if by_expert else ('tensor',)
  spec = (*spec, *[None] * (ndim - len(spec)))
  return tuple(tuple(axis for axis in sharding.names(axes) if axis in kept) for axes in spec)


def _of_ffn_experts(path: str, ndim: int) -> bool:
  return path.startswith('blocks/ffn/') and sharding.has_experts(path, ndim)
