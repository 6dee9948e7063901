"""A model's weights and layout for generation: every weight lies where it is used.

A token that is generated reads every weight once and does little with it, so that nothing may be
gathered or copied for it. Each layer's array is a buffer of its own, and so is each expert's: on
CPU a slice of a stack is a copy. Only on TPU the FFN experts of a layer are one, for its kernel.
Over a mesh

- `data` and `fsdp` cut the rows of the batch, and no weight;
- `expert` cuts the attention experts, with their keys and values, the hidden columns of every FFN
  expert, and the vocabulary; all devices along it see the same tokens, and one sum adds what they
  made. With whole FFN experts most devices would be idle while one reads the expert of a token;
- `tensor` cuts heads, hidden columns and the vocabulary, as in training.

Legend: L layers, E experts, B batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bam_jax.errors import UserError
from bam_jax.model import parameters
from bam_jax.parallel import sharding
from bam_jax.parallel.collectives import Layout

ROWS = P(('data', 'fsdp'))


class Resident(Layout):
  """The collectives of generation, under the names that the model calls."""

  def __init__(self, mesh: jax.sharding.Mesh | None = None, platform: str = ''):
    super().__init__(mesh, platform)
    self.row_shards = self.sizes['data'] * self.sizes['fsdp']
    self.sizes = self.sizes | {'fsdp': 1}  # to the model it is more `data`

  def gather(self, x: jax.Array, *axes: str, dimension: int = 0) -> jax.Array:
    """`x`: tokens lie whole on every device that they concern, and so do weights."""
    return x

  def scatter(self, x: jax.Array, *axes: str, dimension: int = 0) -> jax.Array:
    """The sum of `x` over the devices along the axes."""
    return self.sum(x, *axes)

  def own(self, x: jax.Array) -> jax.Array:
    """`x`: the tokens of a group are those of each of its devices."""
    return x

  def my_numbers(self, experts: jax.Array, count: int) -> jax.Array:
    """`experts`: a device has a part of every FFN expert."""
    return experts

  def join(self, x: jax.Array, *axes: str, dimension: int = 0) -> jax.Array:
    """What lies cut along the axes, such as scores of words, whole."""
    return super().gather(x, *axes, dimension=dimension)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
  """An array with experts on axis 0 as one array for each expert of a device.

  To the model, inside `Layout.spread`, it is the array: `shape`, `dtype`, and the expert's own
  array for a number. Part i of the E / n on each of n devices has shape (n, ...) and holds the
  experts i, i + E / n, ...: cut along its first axis it gives every device one.
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


def place(read: Callable, abstract: Mapping, layout: Resident, dtype: str) -> dict[str, Any]:
  """Parameters on the devices, a layer and an expert at a time.

  Args:
    read: (path, index) -> the region of a parameter, a NumPy array or one on a device.
    abstract: shapes of the parameters, as `Network.abstract` gives them.
    layout: where they go.
    dtype: of all but norms and routers, which stay float32.

  Returns:
    `abstract`'s tree, but for `blocks`: a list with a tree for each layer, in which arrays of
    experts are `Apart`.

  Raises:
    UserError: an axis of the mesh does not divide what it cuts.
  """

  def one(path, leaf, index, spec):
    x = read(path, index)
    wanted = _dtype(path, dtype)
    x = x.astype(wanted, copy=False) if isinstance(x, np.ndarray) else jnp.asarray(x, wanted)
    return jax.device_put(x, NamedSharding(layout.mesh, spec) if layout.mesh else None)

  check(abstract, layout)
  return _build(abstract, layout, one)


def abstract(tree: Mapping, layout: Resident, dtype: str) -> dict[str, Any]:
  """Shapes, dtypes and shardings of what `place` returns."""

  def one(path, leaf, index, spec):
    x = jax.eval_shape(lambda x: x[index], leaf)
    sharded = NamedSharding(layout.mesh, spec) if layout.mesh else None
    return jax.ShapeDtypeStruct(x.shape, _dtype(path, dtype), sharding=sharded)

  return _build(tree, layout, one)


def specs(tree: Mapping, layout: Resident) -> dict[str, Any]:
  """PartitionSpecs of what `place` returns."""
  return _build(tree, layout, lambda path, leaf, index, spec: spec)


def reader(params: Mapping) -> Callable:
  """What `place` reads from, for a tree of arrays."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  arrays = {sharding.path_of(key_path): leaf for key_path, leaf in leaves}
  return lambda path, index: arrays[path][index]


def check(tree: Mapping, layout: Resident, where: str = '--mesh') -> None:
  """UserError when an axis of the mesh, which `where` names, does not divide what it cuts."""
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    path = sharding.path_of(key_path)
    for size, axes in zip(leaf.shape, _spec(path, len(leaf.shape))):
      parts = int(np.prod([layout.sizes[axis] for axis in axes], initial=1))
      if size % parts:
        raise UserError(
          f'{where} cuts {path} of shape {tuple(leaf.shape)} into {parts} parts along '
          f'{" and ".join(axes)}, which do not divide {size}: choose other mesh sizes.'
        )


def _build(tree: Mapping, layout: Resident, make: Callable) -> dict[str, Any]:
  """The tree that `place` describes, of `make(path, leaf, index, spec)`."""

  def one(key_path, leaf):
    path = sharding.path_of(key_path)
    return make(path, leaf, (), P(*_spec(path, len(leaf.shape))))

  def of_layer(layer, key_path, leaf):
    path = f'blocks/{sharding.path_of(key_path)}'
    spec = _spec(path, len(leaf.shape))[1:]
    stacked = layout.platform == 'tpu' and _of_ffn_experts(path, len(leaf.shape))
    if stacked or not sharding.has_experts(path, len(leaf.shape)):
      return make(path, leaf, (layer,), P(*spec))
    count = leaf.shape[1] // (layout.sizes['expert'] if 'expert' in spec[0] else 1)
    indices = [(layer, slice(i, None, count)) for i in range(count)]
    return Apart(tuple(make(path, leaf, index, P(*spec)) for index in indices))

  num_layers = jax.tree.leaves(tree['blocks'])[0].shape[0]
  rest = jax.tree_util.tree_map_with_path(one, {k: v for k, v in tree.items() if k != 'blocks'})
  return rest | {
    'blocks': [
      jax.tree_util.tree_map_with_path(lambda path, x, i=i: of_layer(i, path, x), tree['blocks'])
      for i in range(num_layers)
    ]
  }


def _spec(path: str, ndim: int) -> tuple[tuple[str, ...], ...]:
  """The axes that cut each dimension of a parameter: those of training that move no weight."""
  if _of_ffn_experts(path, ndim):
    hidden = 2 if path.endswith('down') else 3
    return tuple(('tensor', 'expert') if d == hidden else () for d in range(ndim))
  spec = sharding.spec_of(path, ndim)
  by_expert = sharding.has_experts(path, ndim) or path in ('embed/table', 'unembed/kernel')
  kept = ('tensor', 'expert') if by_expert else ('tensor',)
  spec = (*spec, *[None] * (ndim - len(spec)))
  return tuple(tuple(axis for axis in sharding.names(axes) if axis in kept) for axes in spec)


def _of_ffn_experts(path: str, ndim: int) -> bool:
  return path.startswith('blocks/ffn/') and sharding.has_experts(path, ndim)


def _dtype(path: str, dtype: str) -> jnp.dtype:
  name = path.rsplit('/', 1)[-1]
  return jnp.dtype(jnp.float32 if name in parameters.FLOAT32_NAMES else dtype)
