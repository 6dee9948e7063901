"""The device mesh, and the sharding of every array.

Parameters are matched by path in one table; experts have an axis more, which is sharded over the
mesh's. A path without a rule raises: nothing is replicated by accident.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.config.strict import require

AXES = ('data', 'fsdp', 'expert', 'tensor')
BATCH = P(('data', 'fsdp', 'expert'))
FSDP = ('fsdp', 'expert')  # arrays without experts are sharded over that axis too
VOCABULARY = ('tensor', 'expert', 'fsdp')  # fsdp innermost: its parts are contiguous

# Of dense models. Output projections are sharded on their second-to-last dimension: a slice of D
# need not be a multiple of the hardware's tile, and a reduce-scatter would become an all-reduce.
RULES = {
  'embed/table': P(VOCABULARY, None),
  'unembed/kernel': P(None, VOCABULARY),
  'blocks/attention/query': P(None, FSDP, 'tensor', None),
  'blocks/attention/key': P(None, FSDP, 'tensor', None),
  'blocks/attention/value': P(None, FSDP, 'tensor', None),
  'blocks/attention/out': P(None, 'tensor', FSDP, None),
  'blocks/attention/query_scale': P(None, 'tensor', None),
  'blocks/attention/key_scale': P(None, 'tensor', None),
  'blocks/attention/query_shared_scale': P(None, None),
  'blocks/attention/key_shared_scale': P(None, None),
  'blocks/attention/query_bias': P(None, 'tensor', None),
  'blocks/attention/key_bias': P(None, 'tensor', None),
  'blocks/attention/value_bias': P(None, 'tensor', None),
  'blocks/attention/out_bias': P(None, None),
  'blocks/ffn/gate': P(None, FSDP, 'tensor'),
  'blocks/ffn/up': P(None, FSDP, 'tensor'),
  'blocks/ffn/down': P(None, ('tensor', *FSDP), None),
  'blocks/ffn/gate_bias': P(None, 'tensor'),
  'blocks/ffn/up_bias': P(None, 'tensor'),
  'blocks/ffn/down_bias': P(None, None),
}
NORMS = (
  'final_norm',
  *(f'blocks/{name}' for name in ('norm', 'ffn_norm', 'attention_out_norm', 'ffn_out_norm')),
)
REPLICATED = (
  *(f'{norm}/{name}' for norm in NORMS for name in ('scale', 'bias')),
  'blocks/attention/router', 'blocks/ffn/router', 'blocks/ffn/expert_bias',
  'embed/router', 'embed/directions', 'unembed/directions',
)  # fmt: skip


def make_mesh(mesh: config.Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """The mesh over the first of this job's or other devices; UserError if there are too few."""
  devices = jax.devices() if devices is None else list(devices)
  wrong = f'mesh {config.to_dict(mesh)} requires {mesh.size} devices, but there are {len(devices)}'
  require(mesh.size <= len(devices), f'{wrong}: make mesh smaller.')
  shape = (mesh.data, mesh.fsdp, mesh.expert, mesh.tensor)
  if devices[0].platform == 'tpu' and mesh.size == len(devices):
    grid = _along_links(shape, devices)
  else:
    grid = np.asarray(devices[: mesh.size]).reshape(shape)
  return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _along_links(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
  """TPUs ordered so that each axis runs along links of their torus, and `data` across slices.

  In the default order, host by host, the groups of different axes would share links.
  """
  slices = _num_slices(devices)
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  wrong = f'mesh.data={shape[0]} is not a multiple of the {slices} slices'
  require(shape[0] % slices == 0, f'{wrong}: only data may span slices.')
  return mesh_utils.create_hybrid_device_mesh(
    (shape[0] // slices, *shape[1:]),
    (slices, *[1] * (len(shape) - 1)),
    devices,
    allow_split_physical_axes=True,
  )


def lines(mesh: jax.sharding.Mesh, axis: str) -> tuple[int, ...]:
  """Sizes of the torus dimensions that a mesh axis runs along, outermost first.

  More than one only if the axis spans a whole slice: otherwise XLA finds them itself.
  """
  size, slices = mesh.shape[axis], _num_slices(mesh.devices.flat)
  if mesh.devices.flat[0].platform != 'tpu' or size * slices < mesh.size:
    return (size,)
  along = np.moveaxis(mesh.devices, AXES.index(axis), 0).reshape(size, -1)[:, 0]
  places = np.asarray([device.coords for device in along])
  moving = [column for column in places.T if len(set(column)) > 1]
  moving.sort(key=lambda column: -np.argmax(column != column[0]))
  sizes = tuple(len(set(column)) for column in moving)
  return sizes if np.prod(sizes, initial=1) == size else (size,)


def _num_slices(devices: Iterable[Any]) -> int:
  return len({getattr(device, 'slice_index', 0) for device in devices})


def path_of(key_path: tuple) -> str:
  """A JAX key path's dictionary keys joined by "/", without those added by optimizer states."""
  return '/'.join(key.key for key in key_path if isinstance(key, jax.tree_util.DictKey))


def spec_of(path: str, ndim: int) -> P:
  """The PartitionSpec of a parameter; ValueError for a path without a rule."""
  if path in REPLICATED:
    return P()
  spec = RULES.get(path)
  if has_experts(path, ndim):  # on an axis of their own, and over `fsdp` alone otherwise
    layers, *rest = (tuple(axis for axis in names(axes) if axis != 'expert') for axes in spec)
    return P(layers, 'expert', *rest)
  if spec is None or len(spec) != ndim:
    raise ValueError(f'No sharding rule for {path} with {ndim} dimensions.')
  return spec


def has_experts(path: str, ndim: int) -> bool:
  """Whether a parameter has an axis of experts, after that of layers."""
  return path.startswith('blocks/') and path in RULES and ndim == len(RULES[path]) + 1


def names(axes: None | str | tuple[str, ...]) -> tuple[str, ...]:
  """The mesh axes in one entry of a PartitionSpec."""
  return (axes,) if isinstance(axes, str) else axes or ()


def specs(tree: Any) -> Any:
  """PartitionSpecs of parameters, or of an optimizer's state, whose counters have no key."""

  def one(key_path, leaf):
    path = path_of(key_path)
    return spec_of(path, len(leaf.shape)) if path else P()

  return jax.tree_util.tree_map_with_path(one, tree)


def tree(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
  """The same as shardings on a mesh."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(abstract))


def abstract(tree: Any, shardings: Any) -> Any:
  """Shapes and dtypes of `tree` at `shardings`: what to restore or to compute, and where."""
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return jax.tree.map(place, tree, shardings)


def check(abstract: Any, mesh: config.Mesh, where: str) -> None:
  """UserError if an axis of `{where}.mesh` does not divide a parameter's dimension."""
  check_divides(abstract, config.to_dict(mesh), f'{where}.mesh', spec_of)


def check_divides(
  abstract: Any, sizes: Mapping[str, int], where: str, spec: Callable[[str, int], Sequence]
) -> None:
  """UserError when axes of these sizes, which `where` sets, do not divide a parameter's dimension.

  `spec` is (path, ndim) -> for each dimension the axes that shard it, as in a PartitionSpec.
  """
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
    path = path_of(key_path)
    for dimension, entry in zip(leaf.shape, spec(path, len(leaf.shape))):
      axes = names(entry)
      parts = int(np.prod([sizes[axis] for axis in axes], initial=1))
      wrong = f'{where} splits {path} of shape {tuple(leaf.shape)} into {parts} parts along'
      fix = f'which do not divide {dimension}: choose other mesh sizes.'
      require(dimension % parts == 0, f'{wrong} {" and ".join(axes)}, {fix}')


def batch(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The sharding of a batch's arrays, along their first axis."""
  return NamedSharding(mesh, BATCH)


def put_batch(arrays: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """This process's rows of a batch, as its part of the global arrays."""
  sharding = batch(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in arrays.items()}
