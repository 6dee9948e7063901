"""AdamW and its learning rate.

The learning rate is an input of the train step and not a part of the optimizer: runs that differ
only in their schedule then share one compiled step.
"""

from collections.abc import Callable

import jax
import optax

from bam_jax import config
from bam_jax.model import parameters
from bam_jax.parallel import sharding


def adamw(options: config.Optimizer) -> optax.GradientTransformation:
  """Clipping, Adam's moments and decoupled weight decay; the step scales by -learning rate.

  Weight decay spares the scales of norms and the biases of routers (arXiv 1711.05101; the paper
  decays by 0.1).
  """
  clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
  return optax.chain(
    clip,
    optax.scale_by_adam(options.b1, options.b2, options.epsilon),
    optax.add_decayed_weights(options.weight_decay, mask=decayed),
  )


def decayed(params) -> dict:
  """True for the parameters that decay."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: sharding.path_of(path).split('/')[-1] not in parameters.UNDECAYED, params
  )


def learning_rate(
  schedule: config.Schedule, warmup_steps: int, total_steps: int
) -> Callable[[int], float]:
  """The learning rate of step n = 0, 1, ...

  It grows by equal parts, the first of them already at step 0, to the peak at step
  `warmup_steps - 1`, and reaches `min_lr_ratio` of it at the last step.
  """
  peak, end = schedule.peak_learning_rate, schedule.min_lr_ratio * schedule.peak_learning_rate
  cosine = optax.cosine_decay_schedule(
    peak, max(total_steps - warmup_steps, 1), schedule.min_lr_ratio
  )
  warm = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))

  def at(step: int) -> float:
    count = step + 1
    if count >= total_steps:
      return end
    return float(warm(count) if count < warmup_steps else cosine(count - warmup_steps))

  return at
