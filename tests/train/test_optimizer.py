"""AdamW against its formulas in NumPy, in float64; learning rates against optax's, to the bit."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from bam_jax import config
from bam_jax.model import transformer
from bam_jax.train import optimizer

RATES = (0.3, 0.1, 0.2, 0.05, 0.4)


def tree(rng, size: float = 1.0) -> dict:
  """Arrays under names that decay and names that do not, some `size` large."""
  shapes = {'table': (5, 3), 'scale': (2, 3), 'up': (2, 3, 4), 'router': (2, 3, 2)}
  draw = lambda name: size * ((name == 'scale') + rng.normal(size=shapes[name]))
  return {name: draw(name).astype(np.float32) for name in shapes}


def wide(params: dict) -> dict[str, np.ndarray]:
  return {name: np.asarray(array, np.float64) for name, array in params.items()}


def reference(params: dict, gradients: list[dict], options: config.Optimizer) -> dict:
  """AdamW with decoupled weight decay, arXiv 1711.05101, clipped by the global norm."""
  params = wide(params)
  first = {name: np.zeros_like(x) for name, x in params.items()}
  second = {name: np.zeros_like(x) for name, x in params.items()}
  for t, (gradient, rate) in enumerate(zip(gradients, RATES, strict=True), start=1):
    gradient = wide(gradient)
    norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
    if options.clip_norm and norm > options.clip_norm:
      gradient = {name: g * options.clip_norm / norm for name, g in gradient.items()}
    for name, g in gradient.items():
      first[name] = options.b1 * first[name] + (1 - options.b1) * g
      second[name] = options.b2 * second[name] + (1 - options.b2) * g**2
      m = first[name] / (1 - options.b1**t)
      v = second[name] / (1 - options.b2**t)
      decay = 0 if name.endswith('scale') else options.weight_decay
      update = m / (np.sqrt(v) + options.epsilon) + decay * params[name]
      params[name] = params[name] - rate * update
  return params


@pytest.mark.parametrize('options', [
  config.Optimizer(),
  config.Optimizer(weight_decay=0.5, b1=0.7, b2=0.8, epsilon=0.1, clip_norm=2.0),
  config.Optimizer(clip_norm=0, weight_decay=0),
  config.Optimizer(b1=0, b2=0, epsilon=1.0),
], ids=str)  # fmt: skip
def test_adamw(options):
  rng = np.random.default_rng(0)
  start = params = tree(rng)
  # Norms on both sides of the bounds: about 7, and the third and fourth well below 1.
  gradients = [tree(rng, size) for size in (1, 2, 0.02, 0.1, 5)]
  adamw = optimizer.adamw(options)
  state = adamw.init(params)
  # The counter of the bias correction is the one that is not.
  assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {'float32', 'int32'}
  for gradient, rate in zip(gradients, RATES, strict=True):
    updates, state = adamw.update(gradient, state, params)
    params = optimizer.apply_updates(params, updates, np.float32([rate, rate]), ())
  got, want = wide(params), reference(start, gradients, options)
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_what_decays(models):
  for model in models.values():
    network = transformer.Network(
      dataclasses.replace(model, qk_norm='head_layernorm'), config.Compute()
    )
    decayed = traverse_util.flatten_dict(optimizer.decayed(network.abstract()), sep='/')
    spared = {name for name, decays in decayed.items() if not decays}
    heads = {'blocks/attention/query_scale', 'blocks/attention/key_scale'}
    assert spared == {'blocks/norm/scale', 'final_norm/scale', *heads}


@pytest.fixture
def rates(recipe_dict):
  """The function (warm-up, steps, ...) -> learning rates of all steps, float32 [steps, 2]."""

  def make(warmup: int, total: int, ratio=0.1, peak=2.0, routers=0) -> np.ndarray:
    schedule = {'peak_learning_rate': peak, 'warmup_steps': warmup, 'min_lr_ratio': ratio}
    changes = dict(schedule=schedule, tokens=total * 128, router_warmup_steps=routers)
    recipe_dict['runs'] = {'seed': recipe_dict['runs']['seed'] | changes}
    recipe = config.parse(recipe_dict)
    steps = range(1, total + 1)
    return np.array([optimizer.learning_rates(recipe, 'seed', step) for step in steps])

  return make


@pytest.mark.parametrize('peak', [2.0, 4e-3, 3e-4])
@pytest.mark.parametrize(
  'warmup, total, ratio',
  [(0, 1, 0.1), (0, 2, 0), (4, 20, 1.0), (19, 20, 0.1), (40, 341, 0.1), (20, 183, 0), (5, 5, 0.1)],
)
def test_learning_rates_are_those_of_optax_to_the_bit(rates, warmup, total, ratio, peak):
  """Update n has seen n batches: it stands at n of the schedule, and the last at its end."""
  got = rates(warmup, total, ratio, peak)
  cosine = optax.cosine_decay_schedule(peak, max(total - warmup, 1), ratio)
  warm = optax.linear_schedule(0.0, peak, max(warmup, 1))
  want = [warm(n) if n < warmup else cosine(n - warmup) for n in range(1, total)] + [ratio * peak]
  assert got.dtype == np.float32 and got.shape == (total, 2)
  np.testing.assert_array_equal(got[:, 0], np.array(want, np.float32))
  np.testing.assert_array_equal(got[:, 1], got[:, 0])


def test_learning_rates_at_their_corners(rates):
  got = rates(4, 20)[:, 0]
  routers_first = rates(4, 20, routers=6)
  np.testing.assert_array_equal(routers_first[:, 0], got)
  np.testing.assert_array_equal(routers_first[:, 1], np.where(np.arange(20) < 6, 0, got))
