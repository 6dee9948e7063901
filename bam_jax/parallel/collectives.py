"""A model's arrays across the devices of a mesh, as the collectives that the model calls.

Every device runs the model's own code on its rows of the batch and its part of the weights, inside
one `shard_map`, so that what moves between devices is written here and nowhere else:

- weights that `fsdp` cuts are gathered a layer at a time, in the compute dtype;
- in a mixture's block the tokens of an `expert` group are gathered once, every device computes its
  experts' part for all of them, and one reduce-scatter adds the parts and returns them to the
  tokens' owners: gather once, reduce once;
- `tensor` cuts heads and hidden columns, and adds up what the block's output is missing.

Gradients are taken inside as well, of the sum of all devices' losses: a gather's gradient is then a
reduce-scatter, and a weight that lies on several devices adds up theirs once, at the end of a step.
On one device every function here is the identity.

Legend: B batch, T sequence, E experts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from bam_jax.model import remat
from bam_jax.parallel import sharding

BATCH_AXES = sharding.BATCH[0]


class Layout:
  """The collectives of one mesh, or of one device.

  `platform` says whose kernels run: the mesh's devices', which need not be here (a program can be
  compiled for others), or those of this process.
  """

  def __init__(self, mesh: jax.sharding.Mesh | None = None, platform: str = ''):
    here = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    self.platform = platform or here
    self.mesh = mesh if mesh is not None and mesh.size > 1 else None
    sizes = dict(self.mesh.shape) if self.mesh else {}
    self.sizes = {axis: sizes.get(axis, 1) for axis in sharding.AXES}
    self.lines = {axis: _groups(sharding.lines(self.mesh, axis)) for axis in sizes}

  def spread(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` on every device's part of global arrays, which the specs describe."""
    if self.mesh is None:
      return function
    # Without the check: sums over devices are explicit here, and kernels do not say what they are.
    return jax.shard_map(
      function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )

  def over(self, *axes: str) -> tuple[str, ...]:
    """Those of the axes that have more than one device."""
    return tuple(axis for axis in axes if self.sizes[axis] > 1)

  def sum(self, tree: Any, *axes: str) -> Any:
    """The sum of every array over the devices along the axes."""
    axes = self.over(*axes)
    return jax.lax.psum(tree, axes) if axes else tree

  def total(self, tree: Any) -> Any:
    """Sums over all rows of the batch, of sums over this device's."""
    return self.sum(tree, *BATCH_AXES)

  @property
  def gathers(self) -> bool:
    """Whether weights are cut into parts that a layer gathers."""
    return bool(self.over('fsdp', 'expert'))

  @property
  def copies(self) -> int:
    """Devices that compute the same rows' loss."""
    return self.sizes['tensor']

  def gather(self, x: jax.Array, *axes: str, dimension: int = 0) -> jax.Array:
    """The parts of `x` of all devices along the axes, in their order, along a dimension.

    One line of devices after the other: TPUs make an all-reduce of a reduce-scatter along two axes
    or over a whole slice, and the gradient of a gather is one.
    """
    for axis in reversed(self.over(*axes)):
      for line in reversed(self.lines[axis]):
        x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True, axis_index_groups=line)
    return x

  def scatter(self, x: jax.Array, *axes: str, dimension: int = 0) -> jax.Array:
    """This device's part, along a dimension, of the sum of `x` over the devices along the axes."""
    for axis in self.over(*axes):
      for line in self.lines[axis]:
        x = jax.lax.psum_scatter(
          x, axis, scatter_dimension=dimension, tiled=True, axis_index_groups=line
        )
    return x

  def group(self, x: jax.Array) -> jax.Array:
    """The rows of all devices that share a set of experts."""
    return checkpoint_name(self.gather(x, 'expert'), remat.TOKENS) if self.over('expert') else x

  def own(self, x: jax.Array) -> jax.Array:
    """What of a group's rows is not this device's, set to zero or false."""
    if not self.over('expert'):
      return x
    rows = x.shape[0] // self.sizes['expert']
    number = jnp.arange(x.shape[0]) // rows
    mine = number == jax.lax.axis_index('expert')
    return jnp.where(mine.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))

  def to_owners(self, x: jax.Array) -> jax.Array:
    """This device's rows of the sum over its group."""
    return self.scatter(x, 'expert')

  def first_expert(self, count: int) -> jax.Array | int:
    """The number of the first of this device's `count` experts."""
    return count * jax.lax.axis_index('expert') if self.over('expert') else 0

  def my_experts(self, x_BTE: jax.Array, count: int) -> jax.Array:
    """The columns of this device's `count` experts."""
    if not self.over('expert'):
      return x_BTE
    return jax.lax.dynamic_slice_in_dim(x_BTE, self.first_expert(count), count, axis=-1)

  def my_numbers(self, experts: jax.Array, count: int) -> jax.Array:
    """Numbers among this device's `count` experts; `count` for the experts of others."""
    if not self.over('expert'):
      return experts
    mine = experts - self.first_expert(count)
    return jnp.where((mine >= 0) & (mine < count), mine, count)

  def weights(self, layer: dict, path: str) -> dict:
    """One layer's weights, whole but for what `tensor` and, of experts, `expert` cut.

    Args:
      layer: this device's part of each array, without the axis of the layers.
      path: of `layer`.
    """
    if not self.gathers:
      return layer

    def one(key_path, x):
      name = f'{path}/{sharding.path_of(key_path)}'
      spec = sharding.spec_of(name, x.ndim + 1)
      kept = ('tensor', 'expert') if sharding.has_experts(name, x.ndim + 1) else ('tensor',)
      whole = x
      for dimension, axes in enumerate(spec[1:]):
        cut = tuple(axis for axis in sharding.names(axes) if axis not in kept)
        whole = self.gather(whole, *cut, dimension=dimension)
      return x if whole is x else checkpoint_name(whole, remat.WEIGHTS)

    return jax.tree_util.tree_map_with_path(one, layer)

  def gradient_sums(self, grads: dict) -> dict:
    """Gradients with those of the other devices that hold the same part of a parameter added."""

    def one(key_path, grad):
      spec = sharding.spec_of(sharding.path_of(key_path), grad.ndim)
      cut = [axis for axes in spec for axis in sharding.names(axes)]
      return self.sum(grad, *(axis for axis in sharding.AXES if axis not in cut))

    return jax.tree_util.tree_map_with_path(one, grads)

  def specs(self, tree: Any) -> Any:
    """PartitionSpecs of a tree of parameters."""
    return jax.tree_util.tree_map_with_path(
      lambda key_path, x: sharding.spec_of(sharding.path_of(key_path), x.ndim), tree
    )


def _groups(sizes: tuple[int, ...]) -> list[list[list[int]] | None]:
  """The numbers of an axis' devices in lines of each size, outermost first; None is all of them."""
  if len(sizes) == 1:
    return [None]
  numbers = np.arange(np.prod(sizes)).reshape(sizes)
  return [np.moveaxis(numbers, d, -1).reshape(-1, size).tolist() for d, size in enumerate(sizes)]
