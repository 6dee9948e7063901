"""Destinations of a merge's regions: a run's mesh, or a checkpoint's files."""

import concurrent.futures
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays, manifest
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.model import transformer
from bam_jax.parallel import processes
from bam_jax.upcycle import merge as merge_lib
from bam_jax.upcycle import rules
from bam_jax.upcycle.sources import Reader, Source, check_alike, check_different, fit_rows, ropes


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
      for piece in arrays.pieces(path, spec):
        if box := merge_lib.overlap(arrays.bounds(spec, piece), parts[path]):
          layer = [axis for axis in piece if isinstance(axis, int)]
          index = (*layer, *(slice(*bounds) for bounds in box[len(layer) :]))
          yield path, index, reader.read(path, index).astype(spec.dtype, copy=False)

  return _to_mesh(regions, abstract, shardings)


def _to_mesh(regions: Callable, abstract: Any, shardings: Any) -> Any:
  wanted, shardings = specs(abstract), traverse_util.flatten_dict(shardings, sep='/')
  parts = {}
  for path, spec in wanted.items():  # the smallest box around the parts of this process's devices
    indices = shardings[path].addressable_devices_indices_map(spec.shape).values()
    axes = zip(*(arrays.bounds(spec, index) for index in indices))
    parts[path] = tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in axes)
  made, message = {}, ''
  try:
    for path, of_path in itertools.groupby(regions(wanted, parts), operator.itemgetter(0)):
      made[path] = _assemble(wanted[path], shardings[path], parts[path], of_path)
  except UserError as error:  # other processes may not have seen it
    message = str(error)
  if message := processes.first(message):
    raise UserError(message)
  return traverse_util.unflatten_dict({path: made[path] for path in wanted}, sep='/')


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


def to_checkpoint(
  output: epath.PathLike,
  sources: Sequence[Source],
  upcycle: config.Upcycle,
  seed: int,
  name: str,
  dtype: str,
  command: str,
  progress: Callable[[int, int], None],
  fit: Callable[[merge_lib.Merge, config.Model], Mapping[str, np.ndarray]] | None = None,
) -> checkpoint.Meta:
  """Mixes opened dense models, those of `upcycle.sources`, into a new checkpoint, a new folder.

  With a recipe's seed and run name, random draws equal the recipe's. `dtype` is 'float32' or
  'bfloat16'; `command` is recorded; `progress` is called with the bytes read and written
  so far, and their total. `fit` makes the routers by path where they are fitted to data, from the
  merge and the mixture's model. UserError, and no folder, when the sources cannot be mixed or
  something cannot be read or written.
  """
  check_alike(sources, upcycle.method)
  merge = merge_lib.Merge(fit_rows(sources), upcycle, merge_lib.run_key(seed, name))
  first = merge.sources[0]
  tokenizer = first.tokenizer()
  mixture = rules.mixture_model(first.meta.model, upcycle, ropes(merge.sources))
  wanted = specs(transformer.Network(mixture, config.Compute()).abstract(), jnp.dtype(dtype))
  with folders.new_folder(output, sum(spec.nbytes for spec in wanted.values())) as folder:
    if upcycle.fits_routers:
      merge = merge._replace(routers=fit(merge, mixture))
    with arrays.Writer(folder / 'params', wanted) as writer:
      origins = _write(merge, writer, progress)
    tokenizer.save(folder)
    meta = dataclasses.replace(
      first.meta,
      model=mixture,
      sequence_length=min(source.meta.sequence_length for source in merge.sources),
      run=name or epath.Path(output).name,
      step=0,
      method=upcycle.method,
      sources=rules.expert_names(upcycle, [source.meta.run for source in merge.sources]),
      versions=manifest.versions(),
      manifest=manifest.Manifest(
        command, manifest.now(), origins, rules.rules(mixture, upcycle.norms), upcycle, seed, name
      ),
    )
    checkpoint.write_meta(folder, meta)
  return meta


def copy_to_checkpoint(
  output: epath.PathLike,
  source: Source,
  seed: int,
  command: str,
  progress: Callable[[int, int], None],
) -> checkpoint.Meta:
  """Writes a mixture with other experts, opened by `growth`, into a new checkpoint.

  As `to_checkpoint`, but for `seed`, which is only recorded.
  """
  tokenizer, reader, done = source.tokenizer(), source.reader, 0
  places = [(path, at) for path, spec in reader.specs.items() for at in arrays.pieces(path, spec)]
  total = sum(spec.nbytes for spec in reader.specs.values())
  with folders.new_folder(output, total) as folder:
    with arrays.Writer(folder / 'params', reader.specs) as writer:
      source.check()
      regions = arrays.read_ahead((reader, path, index) for path, index in places)
      for (path, index), array in zip(places, regions):
        arrays.check_finite(array, source.path, path, reader.specs[path], index)
        writer.write(path, index, array)
        done += array.nbytes
        progress(done, total)
    tokenizer.save(folder)
    facts = dict(run=epath.Path(output).name, step=0, versions=manifest.versions())
    facts['manifest'] = dataclasses.replace(source.meta.manifest, command=command, seed=seed)
    meta = dataclasses.replace(source.meta, **facts)
    checkpoint.write_meta(folder, meta)
  return meta


def _write(merge, writer: arrays.Writer, progress) -> tuple[manifest.Source, ...]:
  """Writes the mixture's arrays; returns their sources, with hashes."""
  readers = [source.reader for source in merge.sources]
  total = sum(spec.nbytes for one in (*readers, writer) for spec in one.specs.values())
  hashes = [{path: manifest.Hash() for path in one.specs} for one in readers]
  pending: list[concurrent.futures.Future] = []
  done = 0

  def on_read(source: int, path: str, index: arrays.Index, array: np.ndarray) -> None:
    nonlocal done
    done += array.nbytes
    if pending:
      pending.pop().result()
    pending.append(hashing.submit(hashes[source][path].update, array, index))

  # Hashes use one thread, to keep their order. Checksums run ahead of the mixing, which then reads
  # from the page cache.
  hashing, checking = (concurrent.futures.ThreadPoolExecutor(1) for _ in range(2))
  checks = [checking.submit(one.check) for one in merge.sources]
  try:
    check_different(merge.sources)
    for path, index, array in merge_lib.regions(merge, writer.specs, on_read=on_read):
      writer.write(path, index, array)
      done += array.nbytes
      progress(done, total)
    for future in (*pending, *checks):
      future.result()
  finally:
    for pool in (hashing, checking):
      pool.shutdown(wait=False, cancel_futures=True)
  origins = []
  for (_, folder, meta, *_), mine in zip(merge.sources, hashes):
    array_hashes = {path: one.hexdigest() for path, one in mine.items()}
    content, path = manifest.content_hash(array_hashes), str(folders.absolute(folder))
    origins.append(manifest.Source(path, meta.run, meta.step, content, array_hashes))
  return tuple(origins)
