"""Where the regions of a merge go: onto a run's mesh, or into a checkpoint's files."""

import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays, integrity, manifest
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.parallel import processes
from bam_jax.upcycle import merge, rules
from bam_jax.upcycle.sources import Source, check_different, open_sources, specs


def to_mesh(
  sources: Sequence[Source],
  abstract: Any,
  shardings: Any,
  upcycle: config.Upcycle,
  key: jax.Array,
  routers: Mapping[str, np.ndarray] | None = None,
) -> Any:
  """The mixture's parameters on the devices of a mesh; all processes must call.

  Each process reads what its own devices need, and its memory holds their parts and about one array
  more.

  Args:
    sources: dense checkpoints in the experts' order.
    abstract: shapes and dtypes of the mixture's parameters.
    shardings: of the same structure.
    upcycle: method and options.
    key: of what is drawn.
    routers: [layers, d_model, experts] by path, for `router_init='centroids'`.

  Raises:
    UserError: the sources cannot be mixed; in every process.
  """
  leaves, shardings = (traverse_util.flatten_dict(tree, sep='/') for tree in (abstract, shardings))
  wanted = {path: arrays.Spec(leaf.shape, np.dtype(leaf.dtype)) for path, leaf in leaves.items()}
  parts = {}
  for path, spec in wanted.items():
    indices = shardings[path].addressable_devices_indices_map(spec.shape).values()
    parts[path] = {arrays.bounds(spec, index) for index in indices}
  made, message = {}, ''
  try:
    regions = merge.regions(sources, wanted, upcycle, key, routers=routers, parts=parts)
    for path, group in itertools.groupby(regions, lambda region: region.path):
      made[path] = _assemble(wanted[path], shardings[path], parts[path], group)
  except UserError as error:  # other processes may not have met it
    message = str(error)
  if message := processes.first(message):
    raise UserError(message)
  return traverse_util.unflatten_dict({path: made[path] for path in wanted}, sep='/')


def _assemble(
  spec: arrays.Spec,
  sharding: jax.sharding.Sharding,
  parts: Collection[merge.Box],
  regions: Iterable[merge.Region],
) -> jax.Array:
  """One array from its regions; ValueError unless they fill the parts."""
  buffers = {part: np.empty([stop - start for start, stop in part], spec.dtype) for part in parts}
  missing = {part: buffer.size for part, buffer in buffers.items()}
  for _, index, array in regions:
    region = arrays.bounds(spec, index)
    array = array.reshape([stop - start for start, stop in region])
    for part, buffer in buffers.items():
      if both := merge.overlap(region, part):
        source, target = (
          tuple(slice(start - at, stop - at) for (start, stop), (at, _) in zip(both, box))
          for box in (region, part)
        )
        buffer[target] = array[source]
        missing[part] -= buffer[target].size
  if any(missing.values()):
    raise ValueError(f'An array of shape {spec.shape} was not filled exactly once.')
  return jax.make_array_from_callback(
    spec.shape, sharding, lambda index: buffers[arrays.bounds(spec, index)]
  )


def to_checkpoint(
  output: epath.PathLike,
  upcycle: config.Upcycle,
  *,
  seed: int,
  name: str,
  dtype: str,
  command: str,
  progress: Callable[[int, int], None],
) -> checkpoint.Meta:
  """Makes a mixture's checkpoint of dense ones; returns its `meta`.

  Args:
    output: the folder to make.
    upcycle: its `sources` are paths of checkpoints.
    seed: of what is drawn.
    name: of the run; with a recipe's seed and run name, what is drawn is the recipe's.
    dtype: of the arrays, one of `sources.DTYPES`.
    command: for the record.
    progress: called with the bytes read and written so far, and their total.

  Raises:
    UserError: the sources cannot be mixed, or something cannot be read or written. There is no
      `output` then.
  """
  if upcycle.router_init == 'centroids':
    raise UserError(
      "router_init='centroids' needs the sources' training data: upcycle in a recipe, or choose "
      "'random' or 'zero'."
    )
  sources = open_sources(upcycle.sources)
  for source in sources:
    if epath.Path(os.path.realpath(source.folder)) in epath.Path(os.path.realpath(output)).parents:
      raise UserError(f'{output} lies inside the source {source.path}: choose another folder.')
  tokenizer = checkpoint.find_tokenizer(sources[0].folder)
  mixture = rules.mixture_model(sources[0].meta.model, upcycle)
  wanted = specs(mixture, jnp.dtype(dtype))
  with folders.new_folder(output, sum(spec.nbytes for spec in wanted.values())) as folder:
    with arrays.Writer(folder / 'params', wanted) as writer:
      hashes = _write(sources, writer, upcycle, merge.run_key(seed, name), progress)
    (folder / tokenizer.name).write_bytes(tokenizer.read_bytes())
    origins = [
      manifest.Source(
        path=str(folders.absolute(source.folder)),
        run=source.meta.run,
        step=source.meta.step,
        hash=manifest.content_hash(array_hashes),
        array_hashes=array_hashes,
      )
      for source, array_hashes in zip(sources, hashes)
    ]
    meta = dataclasses.replace(
      sources[0].meta,
      format=checkpoint.FORMAT,
      model=mixture,
      run=name or epath.Path(output).name,
      step=0,
      method=upcycle.method,
      sources=rules.expert_names(upcycle, [source.meta.run for source in sources]),
      versions=manifest.versions(),
      manifest=manifest.Manifest(
        command=command,
        time=manifest.now(),
        sources=tuple(origins),
        made=rules.record(mixture),
        upcycle=upcycle,
        seed=seed,
        name=name,
      ),
    )
    checkpoint.write_meta(folder, meta)
  return meta


def _write(sources, writer, upcycle, key, progress) -> list[dict[str, str]]:
  """Writes the mixture's arrays; for each source the `manifest.Hash` of its arrays by path."""
  items = [*(source.reader for source in sources), writer]
  total = sum(spec.nbytes for item in items for spec in item.specs.values())
  hashes = [{path: manifest.Hash(s.shape) for path, s in item.specs.items()} for item in items[:-1]]
  pending: list[concurrent.futures.Future] = []
  done = 0

  def on_read(source: int, path: str, index: arrays.Index, array: np.ndarray) -> None:
    nonlocal done
    done += array.nbytes
    if pending:
      pending.pop().result()
    pending.append(hashing.submit(hashes[source][path].update, array, index))

  # Hashes need one thread, for their order. Checksums run ahead of the mixing, which finds in
  # memory what they read.
  hashing, checking = (concurrent.futures.ThreadPoolExecutor(1) for _ in range(2))
  checks = [checking.submit(integrity.check, one.folder, ['params']) for one in sources]
  try:
    check_different(sources)
    for path, index, array in merge.regions(sources, writer.specs, upcycle, key, on_read=on_read):
      writer.write(path, index, array)
      done += array.nbytes
      progress(done, total)
    for future in (*pending, *checks):
      future.result()
  finally:
    for pool in (hashing, checking):
      pool.shutdown(wait=False, cancel_futures=True)
  return [{path: one.hexdigest() for path, one in mine.items()} for mine in hashes]
