"""Mixtures into new checkpoints: streamed, hashed, complete or absent."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from etils import epath

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays, manifest
from bam_jax.files import folders
from bam_jax.model import transformer
from bam_jax.upcycle import merge as merge_lib
from bam_jax.upcycle import outputs, rules
from bam_jax.upcycle.sources import Source, check_alike, check_different, fit_rows, ropes


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
  wanted = outputs.specs(
    transformer.Network(mixture, config.Compute()).abstract(), jnp.dtype(dtype)
  )
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
