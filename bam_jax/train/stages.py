"""Which parameters learn, how fast, and from when: frozen groups, slower groups, routers first.

What differs between parameters is decided while the step is built; only learning rates go in.
"""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.model import parameters, transformer
from bam_jax.parallel import sharding


@dataclass(frozen=True)
class Stages:
  """What of a run's stages the compiled step depends on; hashable, a part of its cache's key."""

  factors: tuple[tuple[str, float], ...] = ()  # pattern, factor of the learning rate
  router_warmup: bool = False  # routers have a learning rate of their own


def of(run: config.Run) -> Stages:
  """The stages of a run."""
  factors = tuple(sorted(run.learning_rate_factors.items()))
  return Stages(factors, router_warmup=run.router_warmup_steps > 0)


def rates(learning_rate: Callable[[int], float], router_warmup_steps: int) -> Callable:
  """What the step takes as learning rate at step n = 0, 1, ...

  Returns:
    `learning_rate` itself without a warm-up of the routers, else the function n -> (rate of
    routers, rate of all else), the second of which is 0 during the warm-up.
  """
  if not router_warmup_steps:
    return learning_rate

  def at(step: int) -> tuple[float, float]:
    rate = learning_rate(step)
    return rate, rate if step >= router_warmup_steps else 0.0

  return at


def factor(path: str, factors: tuple[tuple[str, float], ...]) -> float:
  """The factor of a parameter: of the longest pattern that matches its path, 1 if none does."""
  matching = [(len(pattern), pattern, value) for pattern, value in factors if _hit(pattern, path)]
  return max(matching)[-1] if matching else 1.0


def check(run: config.Run, model: config.Model, where: str) -> None:
  """UserError when a pattern matches no parameter, or a model without routers is to warm them."""
  if run.router_warmup_steps and model == model.dense():
    raise UserError(
      f'{where}.router_warmup_steps={run.router_warmup_steps} has no meaning for a dense model, '
      'which has no router: set it to 0.'
    )
  if not run.learning_rate_factors:
    return
  paths = _paths(transformer.Network(model, config.Compute()).abstract())
  for pattern in run.learning_rate_factors:
    if not any(_hit(pattern, path) for path in paths):
      raise UserError(
        f'{where}.learning_rate_factors has the pattern {pattern!r}, which matches no parameter: '
        f'there are {", ".join(paths)}.'
      )


def learnable(stages: Stages) -> Callable[[dict], dict]:
  """The function that sets the gradients of frozen parameters to 0.

  They then do not count in the norm that clipping bounds, and XLA computes none of them.
  """
  if not any(value == 0 for _, value in stages.factors):
    return lambda grads: grads

  def one(path, grad):
    return grad if factor(sharding.path_of(path), stages.factors) else jnp.zeros_like(grad)

  return lambda grads: jax.tree_util.tree_map_with_path(one, grads)


def learner(stages: Stages) -> Callable[[dict, dict, Any], dict]:
  """The function `(params, updates, learning_rate) -> params`, `params - rate * updates`.

  Args:
    stages: with `router_warmup`, the learning rate is the pair that `rates` gives. A factor of 0
      returns the array itself: weight decay, a part of the update, does not move it either.
  """
  if stages == Stages():
    return _uniform

  def learn(params, updates, learning_rate):
    pair = learning_rate if stages.router_warmup else (learning_rate, learning_rate)

    def one(key_path, param, update):
      path = sharding.path_of(key_path)
      value = factor(path, stages.factors)
      if not value:
        return param
      rate = pair[path.split('/')[-1] not in parameters.ROUTERS]
      return (param - value * rate * update).astype(param.dtype)

    return jax.tree_util.tree_map_with_path(one, params, updates)

  return learn


def _uniform(params, updates, learning_rate):
  return optax.apply_updates(params, jax.tree.map(lambda u: -learning_rate * u, updates))


def _hit(pattern: str, path: str) -> bool:
  """Whether a path lies under the prefix `pattern` or, with wildcards, is what it describes."""
  return path == pattern or path.startswith(f'{pattern}/') or fnmatch.fnmatchcase(path, pattern)


def _paths(tree: dict) -> list[str]:
  return [sharding.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
