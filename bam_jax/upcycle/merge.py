"""Dense parameters into a mixture's, by the table in rules.py and by nothing else.

Strict: every source array is consumed exactly once, every target array is written exactly once, and
every shape is the one that the mixture's model says. Anything else raises.

What is made of a piece is a function of that piece, so that `stream`, which holds only a few at a
time, makes the same numbers.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.upcycle import options, rules


def merge(
  sources: Sequence[dict[str, Any]],
  target: dict[str, Any],
  mixture: config.Model,
  upcycle: config.Upcycle,
  key: jax.Array,
  routers: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
  """The mixture's parameters, as NumPy arrays.

  Args:
    sources: dense parameters in the experts' order; the first is also what extra experts copy.
    target: shapes and dtypes of the mixture's parameters.
    mixture: the model that `rules.mixture_model` made.
    upcycle: how many experts, how routers start, and the options beyond the paper.
    key: for whatever is drawn.
    routers: every router by its path, with `router_init='centroids'` and only with it.

  Raises:
    UserError: a source has an array too many, one too few, or one of another shape.
  """
  if len(sources) != len(upcycle.sources):
    raise UserError(f'from names {len(upcycle.sources)} sources and {len(sources)} were given.')
  flat = [traverse_util.flatten_dict(source, sep='/') for source in sources]
  wanted = traverse_util.flatten_dict(target, sep='/')
  table = rules.rules(mixture)
  check_paths({f'Source {number}': source for number, source in enumerate(flat)}, wanted, table)
  _check_routers(routers or {}, table, upcycle)
  made = {}
  for rule in table:
    shape = wanted[rule.target].shape
    if rule.source:
      array = combine(rule, [source[rule.source] for source in flat], upcycle, key)
    elif rule.how == 'router' and upcycle.router_init == 'centroids':
      array = routers[rule.target]
    else:
      array = initial(rule, shape, upcycle, key)
    if array.shape != shape:
      raise UserError(f'{rule.target} would have shape {array.shape}; the mixture wants {shape}.')
    made[rule.target] = array.astype(wanted[rule.target].dtype)
  return traverse_util.unflatten_dict(made, sep='/')


def combine(
  rule: rules.Rule, arrays: Sequence[np.ndarray], upcycle: config.Upcycle, key: jax.Array
) -> np.ndarray:
  """One target array from the sources' arrays of equal shape.

  The result depends on no other rule, so that a mixture may be made one array at a time.
  """
  shapes = {tuple(array.shape) for array in arrays}
  if len(shapes) > 1:
    raise UserError(f'{rule.source} has different shapes in the sources: {sorted(shapes)}.')
  if rule.how == 'mean':
    return options.average(arrays, upcycle)
  layers, *rest = arrays[0].shape
  stacked = np.empty((layers, upcycle.experts, *rest), arrays[0].dtype)
  for number, array in enumerate(arrays):
    for layer in range(layers):
      for expert, made in experts(rule.target, layer, number, array[layer], upcycle, key):
        stacked[layer, expert] = made
  return stacked


def experts(
  path: str, layer: int, source: int, array: np.ndarray, upcycle: config.Upcycle, key: jax.Array
) -> Iterator[tuple[int, np.ndarray]]:
  """The experts of one layer that are made of one source, and their numbers.

  Experts past the sources are copies of the first source's.

  Args:
    path: of the target array.
    layer: its number.
    source: its number.
    array: the source's, of that layer; it is not changed, and may be yielded as it is.
    upcycle: how many experts, and the options.
    key: of the whole merge.
  """
  for expert in (source, *upcycle.copies) if source == 0 else (source,):
    made = options.drop(path, array, layer, expert, upcycle, key)
    yield expert, options.add_noise(path, made, layer, expert, upcycle, key)


def initial(
  rule: rules.Rule, shape: tuple[int, ...], upcycle: config.Upcycle, key: jax.Array
) -> np.ndarray:
  """What no source has: a router that is drawn or zero, or a bias of zeros."""
  if rule.how == 'zero':
    return np.zeros(shape, np.float32)
  scale = upcycle.router_scale if upcycle.router_init == 'random' else 0.0
  return draw_router(rule.target, shape, scale, key)


def run_key(seed: int, name: str) -> jax.Array:
  """The key of what is drawn for a run: its own numbers, whatever other runs a recipe has."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def draw_router(path: str, shape: tuple[int, ...], scale: float, key: jax.Array) -> np.ndarray:
  """A router LDE, normal with standard deviation `scale / sqrt(D)`.

  Its key is a function of its path, so that no order of the rules changes the draw.
  """
  key = jax.random.fold_in(key, zlib.crc32(path.encode()))
  return scale / math.sqrt(shape[-2]) * np.asarray(jax.random.normal(key, shape, jnp.float32))


def _check_routers(routers, table, upcycle) -> None:
  centroids = upcycle.router_init == 'centroids'
  needed = {rule.target for rule in table if rule.how == 'router'} if centroids else set()
  if set(routers) != needed:
    raise ValueError(f'Routers are given for {sorted(routers)} and needed for {sorted(needed)}.')


def check_paths(
  sources: Mapping[str, Iterable[str]], wanted: Iterable[str], table: Sequence[rules.Rule]
) -> None:
  """UserError unless the table consumes all that the sources have and makes all that is wanted.

  Args:
    sources: paths of the arrays of each source, by what messages call it.
    wanted: paths of the mixture's arrays.
    table: its rules.
  """
  targets = [rule.target for rule in table]
  if sorted(targets) != sorted(wanted):
    odd = set(targets) ^ set(wanted)
    raise ValueError(f'The rule table and the mixture differ in {sorted(odd)}.')
  needed = {rule.source for rule in table if rule.source}
  for name, paths in sources.items():
    missing, unused = needed - set(paths), set(paths) - needed
    if missing:
      raise UserError(f'{name} has no {", ".join(sorted(missing))}.')
    if unused:
      raise UserError(f'{name} has {", ".join(sorted(unused))}, which no rule consumes.')
