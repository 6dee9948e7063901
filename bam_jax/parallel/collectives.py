"""All collectives of the model: how its arrays move between the devices of a mesh.

Each device runs the model's code on its rows of the batch and its shard of the weights, inside one
`shard_map`:

- weights sharded over `fsdp` are gathered a layer at a time, in the compute dtype;
- in a mixture's block the tokens of an `expert` group are gathered once, each device computes its
  experts' part for all of them, and one reduce-scatter adds the parts and returns them to the
  tokens' owners: gather once, reduce once;
- `tensor` shards heads and hidden columns; the block's output is summed over it.

Gradients are taken inside as well, of the sum of all devices' losses: a gather's gradient is then a
reduce-scatter, and the gradients of a weight that several devices hold are summed once, at the end
of a step. On one device every function here is the identity.

Legend: B batch, T sequence, E experts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from bam_jax.parallel import sharding

# Name of a gather's result in a rematerialisation policy.
WEIGHTS, TOKENS = 'weights', 'tokens'


class Layout:
  """The collectives of one mesh, or of one device.

  `platform` selects the kernels: that of the mesh's devices, which need not be present (programs
  can be compiled for others), or of this process.
  """

  hidden_axes = ('tensor',)  # that cut the hidden columns of FFN experts

  def __init__(self, mesh: jax.sharding.Mesh | None = None, platform: str = ''):
    present = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    self.platform = platform or present
    self.mesh = mesh if mesh is not None and mesh.size > 1 else None
    sizes = dict(self.mesh.shape) if self.mesh else {}
    self.sizes = {axis: sizes.get(axis, 1) for axis in sharding.AXES}
    self.lines = {axis: _groups(sharding.lines(self.mesh, axis)) for axis in sizes}

  def spread(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` applied to every device's shard of global arrays, as the specs describe."""
    if self.mesh is None:
      return function
    # Unchecked: sums over devices are explicit here, and kernels do not declare theirs.
    return jax.shard_map(
      function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )

  def over(self, *axes: str) -> tuple[str, ...]:
    """The axes among these with more than one device."""
    return tuple(axis for axis in axes if self.sizes[axis] > 1)

  def sum(self, tree: Any, *axes: str) -> Any:
    """The sum of every array over the devices along the axes."""
    axes = self.over(*axes)
    return jax.lax.psum(tree, axes) if axes else tree

  def once(self, x: jax.Array, *axes: str) -> jax.Array:
    """`x` on the first device along axes, zeros on the others: a sum over them has it once."""
    if not (axes := self.over(*axes)):
      return x
    return jnp.where(jax.lax.axis_index(axes) == 0, x, jnp.zeros((), x.dtype))

  def total(self, tree: Any) -> Any:
    """Sums over all rows of the batch, given sums over this device's rows."""
    return self.sum(tree, *sharding.BATCH[0])

  @property
  def gathers(self) -> bool:
    """Whether a layer's weights are gathered from several devices."""
    return bool(self.over('fsdp', 'expert'))

  @property
  def copies(self) -> int:
    """Number of devices that compute the loss of the same rows."""
    return self.sizes['tensor']

  def gather(self, x: jax.Array, *axes: str, dimension: int = 0) -> jax.Array:
    """All-gather: the shards of `x` along the axes, concatenated along a dimension.

    One line of devices after the other: XLA for TPU turns a reduce-scatter along two axes, or over
    a whole slice, into an all-reduce, and the gradient of a gather is a reduce-scatter.
    """
    for axis in reversed(self.over(*axes)):
      for line in reversed(self.lines[axis]):
        x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True, axis_index_groups=line)
    return x

  def scatter(self, x: jax.Array, *axes: str, dimension: int = 0) -> jax.Array:
    """Reduce-scatter: this device's part, along a dimension, of the sum of `x` along the axes."""
    for axis in self.over(*axes):
      for line in self.lines[axis]:
        x = jax.lax.psum_scatter(
          x, axis, scatter_dimension=dimension, tiled=True, axis_index_groups=line
        )
    return x

  def gather_tokens(self, x: jax.Array) -> jax.Array:
    """The rows of all devices that share one set of experts: an `expert` group."""
    return checkpoint_name(self.gather(x, 'expert'), TOKENS) if self.over('expert') else x

  def reduce_tokens(self, x: jax.Array) -> jax.Array:
    """This device's rows of the sum over its `expert` group."""
    return self.scatter(x, 'expert')

  def mask_gathered(self, x: jax.Array) -> jax.Array:
    """Gathered rows, with those of other devices set to zero or false."""
    if not self.over('expert'):
      return x
    rows = x.shape[0] // self.sizes['expert']
    owner = jnp.arange(x.shape[0]) // rows
    local = owner == jax.lax.axis_index('expert')
    return jnp.where(local.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))

  def first_number(self, count: int, num_experts: int) -> jax.Array | int:
    """The number among all experts of the first of the `count` on this device."""
    return count * jax.lax.axis_index('expert') if count < num_experts else 0

  def local_columns(self, x_BTE: jax.Array, count: int) -> jax.Array:
    """The columns of the `count` experts on this device."""
    first = self.first_number(count, x_BTE.shape[-1])
    return jax.lax.dynamic_slice_in_dim(x_BTE, first, count, axis=-1)

  def local_numbers(self, experts: jax.Array, count: int, num_experts: int) -> jax.Array:
    """Indices of experts among the `count` on this device; `count` for those on others."""
    if count == num_experts:
      return experts
    local = experts - self.first_number(count, num_experts)
    return jnp.where((local >= 0) & (local < count), local, count)

  def weights(self, layer: dict, path: str, travelling: str = '') -> dict:
    """One layer's weights, gathered except over `tensor` and, for experts, `expert`.

    `layer` has this device's shard of each array, without the layer axis; `path` is its own. All
    experts of arrays below `travelling`, a path, are gathered too.
    """
    if not self.gathers:
      return layer

    def one(key_path, x):
      name = f'{path}/{sharding.path_of(key_path)}'
      spec = sharding.spec_of(name, x.ndim + 1)
      stays = sharding.has_experts(name, x.ndim + 1)
      stays = stays and not (travelling and name.startswith(travelling))
      kept = ('tensor', 'expert') if stays else ('tensor',)
      whole = x
      for dimension, axes in enumerate(spec[1:]):
        cut = tuple(axis for axis in sharding.names(axes) if axis not in kept)
        whole = self.gather(whole, *cut, dimension=dimension)
      return x if whole is x else checkpoint_name(whole, WEIGHTS)

    return jax.tree_util.tree_map_with_path(one, layer)

  def gradient_sums(self, grads: dict) -> dict:
    """Gradients summed over the devices that hold the same shard of a parameter."""

    def one(key_path, grad):
      spec = sharding.spec_of(sharding.path_of(key_path), grad.ndim)
      cut = [axis for axes in spec for axis in sharding.names(axes)]
      return self.sum(grad, *(axis for axis in sharding.AXES if axis not in cut))

    return jax.tree_util.tree_map_with_path(one, grads)


def _groups(sizes: tuple[int, ...]) -> list[list[list[int]] | None]:
  """An axis's device indices in groups of each size, outermost first; None: a single group."""
  if len(sizes) == 1:
    return [None]
  numbers = np.arange(np.prod(sizes)).reshape(sizes)
  return [np.moveaxis(numbers, d, -1).reshape(-1, size).tolist() for d, size in enumerate(sizes)]
