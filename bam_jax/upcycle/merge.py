"""Dense parameters into a mixture's, by the table in rules.py and by nothing else.

Strict: every source array is consumed exactly once, every target array is written exactly once, and
every shape is the one that the mixture's model says. Anything else raises.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
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
  _check_paths(flat, wanted, table)
  _check_routers(routers or {}, table, upcycle)
  made = {}
  for rule in table:
    shape = wanted[rule.target].shape
    if rule.how == 'router' and upcycle.router_init == 'centroids':
      array = routers[rule.target]
    elif rule.how == 'router':
      scale = upcycle.router_scale if upcycle.router_init == 'random' else 0.0
      array = draw_router(rule.target, shape, scale, key)
    elif rule.how == 'zero':
      array = np.zeros(shape, np.float32)
    else:
      arrays = [source.pop(rule.source) for source in flat]
      array = combine(rule, arrays, upcycle, key)
    if array.shape != shape:
      raise UserError(f'{rule.target} would have shape {array.shape}; the mixture wants {shape}.')
    made[rule.target] = array.astype(wanted[rule.target].dtype)
  return traverse_util.unflatten_dict(made, sep='/')


def combine(
  rule: rules.Rule, arrays: Sequence[np.ndarray], upcycle: config.Upcycle, key: jax.Array
) -> np.ndarray:
  """One target array from the sources' arrays of equal shape.

  Experts past the sources are copies of the first source's. The result depends on no other rule, so
  that a mixture may be made one array at a time.
  """
  shapes = {tuple(array.shape) for array in arrays}
  if len(shapes) > 1:
    raise UserError(f'{rule.source} has different shapes in the sources: {sorted(shapes)}.')
  if rule.how == 'mean':
    return options.average(arrays, upcycle)
  stacked = np.stack([*arrays, *[arrays[0]] * len(upcycle.copies)], axis=1)
  options.drop(rule.target, stacked, upcycle, key)
  options.add_noise(rule.target, stacked, upcycle, key)
  return stacked


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


def _check_paths(sources, wanted, table) -> None:
  targets = [rule.target for rule in table]
  if sorted(targets) != sorted(wanted):
    odd = set(targets) ^ set(wanted)
    raise ValueError(f'The rule table and the mixture differ in {sorted(odd)}.')
  needed = {rule.source for rule in table if rule.source}
  for number, source in enumerate(sources):
    missing, unused = needed - set(source), set(source) - needed
    if missing:
      raise UserError(f'Source {number} has no {", ".join(sorted(missing))}.')
    if unused:
      raise UserError(f'Source {number} has {", ".join(sorted(unused))}, which no rule consumes.')
