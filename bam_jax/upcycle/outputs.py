"""A merge's regions onto a run's mesh."""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from bam_jax.checkpoint import arrays
from bam_jax.errors import UserError
from bam_jax.parallel import processes
from bam_jax.upcycle import merge as merge_lib
from bam_jax.upcycle.sources import Reader


def specs(abstract: Any, dtype: np.dtype | None = None) -> dict[str, arrays.Spec]:
  """The arrays of a tree by path, in their own dtypes or in one."""
  leaves = traverse_util.flatten_dict(abstract, sep='/')
  return {path: arrays.Spec(x.shape, np.dtype(dtype or x.dtype)) for path, x in leaves.items()}


def to_mesh(merge: merge_lib.Merge, abstract: Any, shardings: Any) -> Any:
  """The mixture's parameters on the devices of a mesh; all processes must call.

  Each process reads only what its devices need, and holds their parts and about one more array.
  UserError, in every process, when the sources cannot be mixed.
  """
  return _to_mesh(functools.partial(merge_lib.regions, merge), abstract, shardings)


def read_to_mesh(reader: Reader, abstract: Any, shardings: Any) -> Any:
  """What a reader has, in the same way, cast to the dtypes of `abstract`."""

  def regions(wanted, parts):
    for path, spec in wanted.items():
      for index in merge_lib.pieces_within(parts[path], path, spec):
        yield path, index, reader.read(path, index).astype(spec.dtype, copy=False)

  return _to_mesh(regions, abstract, shardings)


def _to_mesh(regions: Callable, abstract: Any, shardings: Any) -> Any:
  wanted, shardings = specs(abstract), traverse_util.flatten_dict(shardings, sep='/')
  parts = {
    path: around(spec, shardings[path].addressable_devices_indices_map(spec.shape).values())
    for path, spec in wanted.items()
  }
  made, message = {}, ''
  try:
    for path, of_path in itertools.groupby(regions(wanted, parts), operator.itemgetter(0)):
      made[path] = _assemble(wanted[path], shardings[path], parts[path], of_path)
  except UserError as error:  # other processes may not have seen it
    message = str(error)
  if message := next(filter(None, processes.gather(message)), ''):
    raise UserError(message)
  return traverse_util.unflatten_dict({path: made[path] for path in wanted}, sep='/')


def around(spec: arrays.Spec, indices: Iterable[arrays.Index]) -> merge_lib.Box:
  """The smallest box around the parts of a process's devices: what it holds of an array at once."""
  axes = zip(*(arrays.bounds(spec, index) for index in indices))
  return tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in axes)


def _assemble(
  spec: arrays.Spec, sharding, part: merge_lib.Box, regions: Iterable[merge_lib.Region]
) -> jax.Array:
  """One array from the regions of this process's part; ValueError unless they fill it."""
  inside = lambda box, of: tuple(slice(a - at, b - at) for (a, b), (at, _) in zip(box, of))
  buffer = np.empty([stop - start for start, stop in part], spec.dtype)
  missing = buffer.size
  for _, index, array in regions:
    region = arrays.bounds(spec, index)
    array = array.reshape([stop - start for start, stop in region])
    if both := merge_lib.overlap(region, part):
      buffer[inside(both, part)] = array[inside(both, region)]
      missing -= array[inside(both, region)].size
  if missing:
    raise ValueError(f'An array of shape {spec.shape} was not filled exactly once.')
  return jax.make_array_from_callback(
    spec.shape, sharding, lambda index: buffer[inside(arrays.bounds(spec, index), part)]
  )
