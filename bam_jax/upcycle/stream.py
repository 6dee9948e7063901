"""Dense checkpoints into a mixture's, a piece at a time: `merge` for models past the memory.

Every source array is read once, checked and hashed on the way, and the checksums of its files are
compared; every target array is written once. A few matrices, of one layer and one expert each, are
in memory at a time.
"""

import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays, integrity, manifest
from bam_jax.config import strict
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.model import transformer
from bam_jax.upcycle import merge, options, rules

DTYPES = ('float32', 'bfloat16')  # what checkpoints may hold


class Source(NamedTuple):
  """An opened dense checkpoint."""

  path: str  # as the user wrote it
  folder: epath.Path
  meta: checkpoint.Meta
  reader: arrays.Reader


class _Job(NamedTuple):
  """A region of one source's array."""

  rule: rules.Rule
  index: arrays.Index
  source: int


def upcycle(
  output: epath.PathLike,
  how: config.Upcycle,
  *,
  seed: int,
  name: str,
  dtype: str,
  command: str,
  progress: Callable[[int, int], None],
) -> checkpoint.Meta:
  """Makes a mixture's checkpoint of dense ones; the `meta` that it gets.

  Args:
    output: the folder to make.
    how: its `sources` are paths of checkpoints.
    seed: of what is drawn.
    name: of the run; with a recipe's seed and run name, what is drawn is the recipe's.
    dtype: of the arrays, 'float32' or 'bfloat16'.
    command: for the record.
    progress: is told how many bytes of how many are read and written.

  Raises:
    UserError: the sources cannot be mixed, or something cannot be read or written. There is no
      `output` then.
  """
  if how.router_init == 'centroids':
    raise UserError(
      "router_init='centroids' takes the sources' training data: let a recipe upcycle them, or "
      "choose 'random' or 'zero'."
    )
  sources = open_sources(how.sources)
  for source in sources:
    if epath.Path(os.path.realpath(source.folder)) in epath.Path(os.path.realpath(output)).parents:
      raise UserError(f'{output} lies inside the source {source.path}: choose another folder.')
  tokenizer = checkpoint.find_tokenizer(sources[0].folder)
  dense = sources[0].meta
  mixture = rules.mixture_model(dense.model, how)
  wanted = specs(mixture, jnp.dtype(dtype))
  written = sum(spec.nbytes for spec in wanted.values())
  read = sum(spec.nbytes for source in sources for spec in source.reader.specs.values())
  done = 0

  def advance(nbytes: int) -> None:
    nonlocal done
    done += nbytes
    progress(done, read + written)

  with (
    folders.new_folder(output, written) as folder,
    concurrent.futures.ThreadPoolExecutor(1) as checking,
  ):
    # Ahead of the mixing, which finds in memory what was checked: the disk reads all of it once.
    checks = [checking.submit(integrity.check, one.folder, ['params']) for one in sources]
    writer = arrays.Writer(folder / 'params', wanted)
    try:
      hashes = mix(sources, writer, mixture, how, merge.run_key(seed, name), advance)
      for check in checks:
        check.result()
    finally:
      checking.shutdown(wait=False, cancel_futures=True)
    (folder / tokenizer.name).write_bytes(tokenizer.read_bytes())
    origins = [
      manifest.Source(
        path=str(folders.absolute(source.folder)),
        run=source.meta.run,
        step=source.meta.step,
        hash=manifest.content_hash(mine),
        array_hashes=mine,
      )
      for source, mine in zip(sources, hashes)
    ]
    runs = tuple(source.meta.run for source in sources)
    meta = dataclasses.replace(
      dense,
      format=checkpoint.FORMAT,
      model=mixture,
      run=name or epath.Path(output).name,
      step=0,
      method=how.method,
      sources=runs + runs[:1] * len(how.copies),
      versions=manifest.versions(),
      manifest=manifest.Manifest(
        command=command,
        time=manifest.now(),
        sources=tuple(origins),
        made=rules.record(mixture),
        upcycle=how,
        seed=seed,
        name=name,
      ),
    )
    checkpoint.write_meta(folder, meta)
  return meta


def open_sources(paths: Sequence[str]) -> list[Source]:
  """Opens checkpoints that can be mixed, in order; their checksums are for the caller to compare.

  Raises:
    UserError: one is missing, damaged, a mixture, not a checkpoint of this format, named twice, of
      another architecture or tokenizer than the first, or with other arrays than its model has.
  """
  sources: list[Source] = []
  seen: dict[str, str] = {}
  for path in paths:
    folder = checkpoint.find(path)
    meta = checkpoint.read_meta(folder)
    other = seen.setdefault(os.path.realpath(folder), path)
    if len(seen) <= len(sources):
      raise UserError(f'{path} is the same checkpoint as {other}: name each source once.')
    if meta.model != meta.model.dense():
      raise UserError(f'{path} is a mixture: only dense models can be mixed.')
    if sources:
      _check_alike(sources[0], path, meta)
    source = Source(path, folder, meta, arrays.Reader(folder / 'params', check=False))
    _check_arrays(source)
    sources.append(source)
  return sources


def specs(model: config.Model, dtype: np.dtype) -> dict[str, arrays.Spec]:
  """The arrays of a model, all in one dtype."""
  abstract = transformer.Network(model, config.Compute()).abstract()
  flat = traverse_util.flatten_dict(abstract, sep='/')
  return {path: arrays.Spec(tuple(leaf.shape), np.dtype(dtype)) for path, leaf in flat.items()}


def mix(
  sources: Sequence[Source],
  writer: arrays.Writer,
  mixture: config.Model,
  upcycle: config.Upcycle,
  key: jax.Array,
  advance: Callable[[int], None],
) -> list[dict[str, str]]:
  """Writes the mixture's parameters.

  Args:
    sources: dense checkpoints in the experts' order.
    writer: has the arrays of `specs(mixture, dtype)`.
    mixture: the model that `rules.mixture_model` made.
    upcycle: how; any `router_init` but 'centroids', which takes data.
    key: for whatever is drawn.
    advance: is told of bytes read and written.

  Returns:
    For each source `manifest.Hash` of its arrays by path.

  Raises:
    UserError: a value is NaN or infinite, two sources are equal, or reading or writing fails.
  """
  table = rules.rules(mixture)
  merge.check_paths({source.path: source.reader.specs for source in sources}, writer.specs, table)

  def write(path: str, index: arrays.Index, array: np.ndarray) -> None:
    array = array.astype(writer.specs[path].dtype, copy=False)
    writer.write(path, index, array)
    advance(array.nbytes)

  for rule in table:
    if rule.source is None:
      shape = writer.specs[rule.target].shape
      write(rule.target, (), merge.initial(rule, shape, upcycle, key))

  jobs = list(_jobs(table, sources, writer.specs))
  regions = arrays.read_ahead(
    (sources[job.source].reader, job.rule.source, job.index) for job in jobs
  )
  hashes = [
    {path: manifest.Hash(spec.shape) for path, spec in source.reader.specs.items()}
    for source in sources
  ]
  held: list[np.ndarray] = []  # of a mean, until all sources' are there
  # One thread: values are hashed in order.
  with concurrent.futures.ThreadPoolExecutor(1) as hashing:
    hashed = hashing.submit(lambda: None)
    for job, array in zip(jobs, regions):
      path, source = job.rule.source, sources[job.source]
      _check_finite(source, path, job.index, array)
      hashed.result()
      hashed = hashing.submit(hashes[job.source][path].update, array, job.index)
      advance(array.nbytes)
      array = array.astype(np.float32, copy=False)
      if job.rule.how == 'stack':
        (layer,) = job.index
        made = merge.experts(job.rule.target, layer, job.source, array, upcycle, key)
        for expert, piece in made:
          write(job.rule.target, (layer, expert), piece)
        continue
      held.append(array)
      if len(held) == len(sources):
        write(job.rule.target, job.index, options.average(held, upcycle))
        held = []
    hashed.result()
  writer.finish()
  by_source = [{path: one.hexdigest() for path, one in mine.items()} for mine in hashes]
  _check_different(sources, by_source)
  return by_source


def _jobs(
  table: Sequence[rules.Rule], sources: Sequence[Source], wanted: Mapping[str, arrays.Spec]
) -> Iterator[_Job]:
  """What to read, in order."""
  for rule in table:
    if rule.source is None:
      continue
    # The target's dtype, since the pieces shall be whole chunks of the target.
    shape = sources[0].reader.specs[rule.source].shape
    spec = arrays.Spec(shape, wanted[rule.target].dtype)
    for index in arrays.pieces(rule.source, spec):
      for number in range(len(sources)):
        yield _Job(rule, index, number)


def _check_alike(first: Source, path: str, meta: checkpoint.Meta) -> None:
  changes = strict.differences(config.to_dict(first.meta.model), config.to_dict(meta.model))
  if changes:
    raise UserError(f'{path} is another model than {first.path} ({"; ".join(changes[:3])}).')
  if meta.tokenizer_hash != first.meta.tokenizer_hash:
    raise UserError(
      f'{path} was trained with another tokenizer than {first.path}: their tokens mean different '
      'text.'
    )
  if meta.format != first.meta.format:
    raise UserError(
      f'{path} has format {meta.format} and {first.path} has {first.meta.format}: mix checkpoints '
      'of one format.'
    )


def _check_arrays(source: Source) -> None:
  """Shapes and dtypes; that nothing is missing or too many is for the rules to say."""
  wanted = specs(source.meta.model, np.float32)
  for path, spec in source.reader.specs.items():
    if path in wanted and spec.shape != wanted[path].shape:
      raise UserError(
        f'{source.path} has {path} of shape {spec.shape} where its model has '
        f'{wanted[path].shape}: it is damaged.'
      )
    if spec.dtype.name not in DTYPES:
      raise UserError(
        f'{source.path} has {path} in {spec.dtype}: only {" and ".join(DTYPES)} can be mixed.'
      )


def _check_finite(source: Source, path: str, index: arrays.Index, array: np.ndarray) -> None:
  finite = np.isfinite(array)
  if finite.all():
    return
  spec = source.reader.specs[path]
  inside = np.argwhere(~finite)[0]
  kept = iter(inside)
  where = [
    start if isinstance(axis, int) else start + int(next(kept))
    for axis, (start, _) in itertools.zip_longest(index, arrays.bounds(spec, index))
  ]
  raise UserError(
    f'{source.path} has {array[tuple(inside)]} at {path}{where}: leave this checkpoint out, or '
    'take an earlier step of its run.'
  )


def _check_different(sources: Sequence[Source], hashes: Sequence[dict[str, str]]) -> None:
  seen: dict[str, str] = {}
  for source, mine in zip(sources, hashes):
    other = seen.setdefault(manifest.content_hash(mine), source.path)
    if other != source.path:
      raise UserError(f'{source.path} holds the same values as {other}: name each source once.')
