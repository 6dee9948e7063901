"""AdamW, the learning rates of a step, and which parameters learn how fast.

Learning rates are an input of the train step and no part of the optimizer: runs that differ only in
their schedule then share one compiled step.
"""

import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bam_jax import config
from bam_jax.config.strict import require
from bam_jax.model import parameters, transformer
from bam_jax.parallel import sharding

Factors = tuple[tuple[str, float], ...]  # pattern, factor of the learning rate


def adamw(options: config.Optimizer) -> optax.GradientTransformation:
  """Clipping, Adam's moments, decoupled weight decay (arXiv 1711.05101); the step scales it."""
  clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
  return optax.chain(
    clip,
    optax.scale_by_adam(options.b1, options.b2, options.epsilon),
    optax.add_decayed_weights(options.weight_decay, mask=decayed),
  )


def decayed(params: dict) -> dict:
  """True for the parameters that decay: all but the scales of norms and all biases."""
  is_decayed = lambda key_path, _: key_path[-1].key not in parameters.UNDECAYED
  return jax.tree_util.tree_map_with_path(is_decayed, params)


def learning_rates(recipe: config.Recipe, name: str, step: int) -> np.ndarray:
  """The learning rates of a run's step 1, 2, ...: float32 [2], of routers and of all else.

  They grow by equal parts, the first of them at step 1, to the peak at step `warmup_steps`, fall
  along a cosine, and are `min_lr_ratio` of the peak at the last step. In the first
  `router_warmup_steps` only routers learn. Computed on the host, which never waits for a device;
  bit for bit what optax's `linear_schedule` and `cosine_decay_schedule` give on a CPU.
  """
  schedule, warmup = recipe.runs[name].schedule, recipe.warmup_steps(name)
  peak, ratio, total = schedule.peak_learning_rate, schedule.min_lr_ratio, recipe.total_steps(name)
  if step >= total:
    rate = ratio * peak
  elif step < warmup:
    rate = peak - peak * (1 - np.float32(step) / np.float32(warmup))
  else:
    angle = np.float32(np.pi) * np.float32(step - warmup) / np.float32(total - warmup)
    # NumPy's complex cosine is the C library's, as XLA's is on CPUs; its real one rounds otherwise.
    cosine = np.cos(np.complex64(angle)).real
    rate = peak * ((1 - ratio) * (0.5 * (1 + cosine)) + ratio)
  return np.array([rate, rate if step > recipe.router_warmup_steps(name) else 0], np.float32)


def factors_of(run: config.Run) -> Factors:
  """The factors of a run's learning rates; hashable, as the key of a compiled step must be."""
  return tuple(sorted({**run.learning_rate_factors, **dict.fromkeys(run.freeze, 0.0)}.items()))


def factor(path: str, factors: Factors) -> float:
  """The factor of a parameter: of the longest pattern that matches its path, 1 if none does."""
  matching = [(len(pattern), pattern, value) for pattern, value in factors if _hit(pattern, path)]
  return max(matching)[-1] if matching else 1.0


def freeze(grads: dict, factors: Factors) -> dict:
  """Gradients in which those of parameters with factor 0 are 0.

  They then do not count in the norm that clipping bounds, and XLA computes none of them.
  """

  def one(key_path, grad):
    return grad if factor(sharding.path_of(key_path), factors) else jnp.zeros_like(grad)

  return jax.tree_util.tree_map_with_path(one, grads)


def only_new(run: config.Run) -> bool:
  """Whether a run trains routers and the last expert alone."""
  return isinstance(run.init, config.FromGrow) and run.init.grow.freeze_old


def of_new_expert(old: dict, new: dict) -> dict:
  """`new` in routers and in the last expert of each array with experts, `old` everywhere else."""

  def one(key_path, old, new):
    if key_path[-1].key in parameters.ROUTERS:
      return new
    if not sharding.has_experts(sharding.path_of(key_path), old.ndim):
      return old
    last_E = jnp.arange(old.shape[1]) == old.shape[1] - 1
    return jnp.where(last_E.reshape(-1, *[1] * (old.ndim - 2)), new, old)

  return jax.tree_util.tree_map_with_path(one, old, new)


def apply_updates(params: dict, updates: dict, learning_rates: jax.Array, factors: Factors) -> dict:
  """`params - factor * learning rate * updates`; a factor of 0 returns the array itself."""

  def one(key_path, param, update):
    if not (scale := factor(sharding.path_of(key_path), factors)):
      return param
    rate = learning_rates[0 if key_path[-1].key in parameters.ROUTERS else 1]
    return (param - scale * rate * update).astype(param.dtype)

  return jax.tree_util.tree_map_with_path(one, params, updates)


def update_expert_bias(bias_LE: jax.Array, load_LE: jax.Array, rate: float) -> jax.Array:
  """`b_i += rate * sign(mean load - load_i)` with int32 loads; arXiv 2408.15664, algorithm 1."""
  # In whole numbers, so that equal loads move nothing: `mean - load` has the sign of the floor of
  # the mean minus the load, and where these two are equal, of what the floor leaves out.
  floor_L1, rest_L1 = jnp.divmod(load_LE.sum(-1, keepdims=True), load_LE.shape[-1])
  return bias_LE + rate * jnp.sign(2 * (floor_L1 - load_LE) + (rest_L1 > 0))


def check(run: config.Run, model: config.Model, where: str) -> None:
  """UserError when a pattern matches no parameter, or a model without routers is to warm them."""
  wrong = f'{where}.router_warmup_steps={run.router_warmup_steps} has no effect on a dense model'
  routed = model != model.dense() or not run.router_warmup_steps
  require(routed, f'{wrong}, which has no router: set it to 0.')
  if not factors_of(run):
    return
  abstract = transformer.Network(model, config.Compute()).abstract()
  paths = [sharding.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract)]
  for pattern, _ in factors_of(run):
    key = 'freeze' if pattern in run.freeze else 'learning_rate_factors'
    wrong = f'{where}.{key} has the pattern {pattern!r}, which matches no parameter'
    matched = any(_hit(pattern, path) for path in paths)
    require(matched, f'{wrong}: there are {", ".join(paths)}.')


def _hit(pattern: str, path: str) -> bool:
  """Whether a path lies under the prefix `pattern` or, with wildcards, is what it describes."""
  return path == pattern or path.startswith(f'{pattern}/') or fnmatch.fnmatchcase(path, pattern)
