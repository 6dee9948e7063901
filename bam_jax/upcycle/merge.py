"""The only merge: dense checkpoints into a mixture's arrays, a region at a time, by rules.py.

Every source array is used as its row says, every target array is written once, and anything else
raises. Only a few matrices, of one layer and one expert each, are in memory at a time. Random draws
depend only on an array's path and the key, not on the order of the regions.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bam_jax import config
from bam_jax.checkpoint import arrays, manifest
from bam_jax.upcycle import rules
from bam_jax.upcycle.sources import WORDS, Source

Box = tuple[tuple[int, int], ...]  # start and stop on every axis of an array
Region = tuple[str, arrays.Index, np.ndarray]  # a part of an array: its path, where, and values


class Merge(NamedTuple):
  """What to merge, and how."""

  sources: Sequence[Source]  # in the experts' order; additional experts copy the first
  upcycle: config.Upcycle
  key: jax.Array  # of the random draws
  routers: Mapping[str, np.ndarray] = {}  # LDE by path, if they are fitted to data


def run_key(seed: int, name: str) -> jax.Array:
  """The key of a run's random draws, independent of the recipe's other runs."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def generator(key: jax.Array, name: str, *numbers: int) -> np.random.Generator:
  """A NumPy generator seeded by the arguments; it draws on the host, whatever an expert's size."""
  words = np.asarray(jax.random.key_data(key)).tolist()
  return np.random.default_rng([*words, zlib.crc32(name.encode()), *numbers])


def regions(
  merge: Merge,
  wanted: Mapping[str, arrays.Spec],
  parts: Mapping[str, Box] | None = None,
  on_read: Callable[[int, str, arrays.Index, np.ndarray], None] = lambda *_: None,
) -> Iterator[Region]:
  """The arrays `wanted` of the mixture in regions, those of one array together.

  `parts` has the required part of every target array, by default all; the rest is not read.
  `on_read` is called with each region read: index of the source, path, index and values.
  UserError when a value is NaN or infinite, or reading fails.
  """
  sources, upcycle, *_ = merge
  mixture = rules.mixture_model(sources[0].meta.model, upcycle)
  table = rules.rules(mixture, upcycle.norms)
  folds = rules.folds(mixture) if upcycle.norms == 'fold' else {}
  parts = parts or {path: arrays.bounds(spec, ()) for path, spec in wanted.items()}
  for rule in table:
    if not rule.source:
      array = drawn(merge, rule, wanted[rule.target].shape)
      yield rule.target, (), array.astype(wanted[rule.target].dtype)

  directions = {}  # E'rD float64, of the sources, by the path of the embeddings
  for rule in table:
    if rule.how == 'directions':
      found = directions[rule.source] = directions_of(sources, upcycle, rule.source)
      array = np.concatenate([*found, *[found[0]] * len(upcycle.copies)])
      yield rule.target, (), array.astype(wanted[rule.target].dtype)

  jobs = list(_jobs(merge, table, wanted, parts))
  reads = arrays.read_ahead((sources[n].reader, rule.source, index) for rule, n, index, _ in jobs)
  held: list[np.ndarray] = []  # arrays of a mean, until every source was read
  for (rule, source, index, experts), array in zip(jobs, reads):
    spec = sources[source].reader.specs[rule.source]
    arrays.check_finite(array, sources[source].path, rule.source, spec, index)
    on_read(source, rule.source, index, array)
    array, dtype = array.astype(np.float32, copy=False), wanted[rule.target].dtype
    if norm := folds.get(rule.target):
      array = times_norm(array, sources[source], norm, index)
    if rule.how == 'fold' and source == 0:
      yield rule.target, index, np.full(array.shape, mixture.norm != 'rmsnorm_plus_one', dtype)
    for expert in experts:
      layer, *rest = index
      yield rule.target, (layer, expert, *rest), array.astype(dtype, copy=False)
    if rule.how in ('mean', 'differences'):
      held.append(array)
      if len(held) == len(sources):
        made = average(held, upcycle)
        if rule.how == 'differences':
          axis = WORDS[rule.target]
          made = beside(made, held, directions[rule.target], len(upcycle.copies), axis)
          index = (slice(None), index[1]) if axis else index[:1]
        yield rule.target, index, made.astype(dtype, copy=False)
        held = []


def times_norm(array: np.ndarray, source: Source, norm: str, index: arrays.Index) -> np.ndarray:
  """A region of one layer of a source's matrix, its rows times the scale of a norm; float32."""
  scale_D = source.reader.read(norm, index[:2]).astype(np.float32)
  scale_D += source.meta.model.norm == 'rmsnorm_plus_one'  # which scales by 1 + w
  return array.astype(np.float32, copy=False) * scale_D.reshape(-1, *[1] * (array.ndim - 1))


def average(arrays: Sequence[np.ndarray], upcycle: config.Upcycle) -> np.ndarray:
  """Averages an array without experts over the sources.

  'mean' is the paper's uniform mean. 'weighted' is the mean by `weights`, which need not add up to
  1; model soups, arXiv 2203.05482. 'first' is the first source's array; FlexOlmo, arXiv 2507.07024.
  """
  if upcycle.average == 'first':
    return arrays[0].copy()
  if upcycle.average == 'mean':
    return sum(arrays[1:], start=arrays[0]) / len(arrays)
  shares = np.asarray(upcycle.weights) / max(upcycle.weights)  # whose sum cannot overflow
  terms = [array * share for array, share in zip(arrays, (shares / shares.sum()).tolist())]
  return sum(terms[1:], start=terms[0])


def directions_of(
  sources: Sequence[Source], upcycle: config.Upcycle, path: str
) -> list[np.ndarray]:
  """The rows (r, D) that span each source's difference from the average embedding best; float64.

  They are right singular vectors of the difference: eigenvectors of its D x D Gram matrix, which is
  summed up a region at a time.
  """
  spec, D = sources[0].reader.specs[path], sources[0].meta.model.d_model
  grams_SDD = np.zeros((len(sources), D, D))
  for index in arrays.pieces(path, spec):
    own = []
    for source in sources:
      own.append(source.reader.read(path, index).astype(np.float32, copy=False))
      arrays.check_finite(own[-1], source.path, path, spec, index)
    mean = average(own, upcycle)
    for gram_DD, array in zip(grams_SDD, own):
      difference = (array - mean).astype(np.float64)
      difference_WD = difference.T if WORDS[path] else difference
      gram_DD += difference_WD.T @ difference_WD
  _, vectors_SDD = np.linalg.eigh(grams_SDD)
  found = [vectors_DD.T[::-1][: upcycle.embedding_rank] for vectors_DD in vectors_SDD]
  # An eigenvector's sign is arbitrary: every process must choose the same.
  largest = [np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1) for x in found]
  return [x_rD * np.sign(x_r1) for x_rD, x_r1 in zip(found, largest)]


def beside(
  mean: np.ndarray, own: Sequence[np.ndarray], directions, copies: int, axis: int
) -> np.ndarray:
  """A region of the average embeddings and, beside it, of each expert's difference along its rows.

  `axis` is that of the words. Additional experts have the first source's.
  """
  turned = lambda x: x.T if axis else x
  parts = [turned(array - mean).astype(np.float64) @ x_rD.T for array, x_rD in zip(own, directions)]
  return turned(np.concatenate([turned(mean), *parts, *parts[:1] * copies], axis=1))


def overlap(one: Box, other: Box) -> Box:
  """The intersection of two boxes; empty if they are disjoint."""
  both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
  return both if all(start < stop for start, stop in both) else ()


def pieces_within(part: Box, path: str, spec: arrays.Spec) -> Iterator[arrays.Index]:
  """Regions that together are a part of an array: `arrays.pieces`, cut where the part ends."""
  for index in arrays.pieces(path, spec):
    if box := overlap(arrays.bounds(spec, index), part):
      layer = [axis for axis in index if isinstance(axis, int)]
      yield *layer, *(slice(*bounds) for bounds in box[len(layer) :])


def drawn(merge: Merge, rule: manifest.Made, shape: tuple[int, ...]) -> np.ndarray:
  """A bias of zeros, or a router LDE: given, or normal with deviation `router_scale / sqrt(D)`."""
  if rule.how == 'zero':
    return np.zeros(shape, np.float32)
  if merge.upcycle.fits_routers:
    return merge.routers[rule.target]
  scale = merge.upcycle.router_scale if merge.upcycle.router_init == 'random' else 0.0
  key = jax.random.fold_in(merge.key, zlib.crc32(rule.target.encode()))
  return scale / math.sqrt(shape[-2]) * np.asarray(jax.random.normal(key, shape, jnp.float32))


def _jobs(merge: Merge, table, wanted, parts):
  # A layer of an array with layers at a time, else a chunk: rule, number of the source, index, and
  # the experts to make of it if the rule stacks.
  upcycle = merge.upcycle
  for rule in table:
    if not rule.source or rule.how == 'directions':
      continue
    part, stack = parts[rule.target], rule.how == 'stack'
    needed = part[:1] + part[2:] if stack else part
    # The target's dtype, since regions must be whole chunks of the target.
    spec = merge.sources[0].reader.specs[rule.source]._replace(dtype=wanted[rule.target].dtype)
    if rule.how == 'differences':  # the target's chunks have fewer words, with more columns
      needed = overlap(part, arrays.bounds(spec, ()))
      spec = wanted[rule.target]
    for index in pieces_within(needed, rule.source, spec):
      for source in range(len(merge.sources)):
        experts = (source, *upcycle.copies) if source == 0 else (source,)
        experts = tuple(e for e in experts if part[1][0] <= e < part[1][1]) if stack else ()
        if experts or not stack:
          yield rule, source, index, experts
