"""AdamW and the learning rate against the formulas in NumPy, in float64."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest

from bam_jax import config
from bam_jax.model import transformer
from bam_jax.train import optimizer

RATES = (0.3, 0.1, 0.2, 0.05, 0.4)


def tree(rng, size: float = 1.0) -> dict:
  """Arrays under names that decay and names that do not, some `size` large."""
  arrays = {
    'embed': {'table': rng.normal(size=(5, 3)).astype(np.float32)},
    'blocks': {
      'norm': {'scale': 1 + rng.normal(size=(2, 3)).astype(np.float32)},
      'ffn': {
        'up': rng.normal(size=(2, 3, 4)).astype(np.float32),
        'router': rng.normal(size=(2, 3, 2)).astype(np.float32),
      },
    },
    'final_norm': {'scale': rng.normal(size=3).astype(np.float32)},
  }
  return jax.tree.map(lambda x: np.float32(size) * x, arrays)


def flat(params: dict) -> dict[str, np.ndarray]:
  return {
    '/'.join(key.key for key in path): np.asarray(leaf, np.float64)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def reference(params: dict, gradients: list[dict], options: config.Optimizer) -> dict:
  """AdamW with decoupled weight decay, arXiv 1711.05101, clipped by the global norm."""
  params = flat(params)
  first = {name: np.zeros_like(x) for name, x in params.items()}
  second = {name: np.zeros_like(x) for name, x in params.items()}
  for t, (gradient, rate) in enumerate(zip(gradients, RATES, strict=True), start=1):
    gradient = flat(gradient)
    norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
    if options.clip_norm and norm > options.clip_norm:
      gradient = {name: g * options.clip_norm / norm for name, g in gradient.items()}
    for name, g in gradient.items():
      first[name] = options.b1 * first[name] + (1 - options.b1) * g
      second[name] = options.b2 * second[name] + (1 - options.b2) * g**2
      m = first[name] / (1 - options.b1**t)
      v = second[name] / (1 - options.b2**t)
      decay = 0 if name.endswith('scale') else options.weight_decay
      params[name] = params[name] - rate * (
        m / (np.sqrt(v) + options.epsilon) + decay * params[name]
      )
  return params


def run(params: dict, gradients: list[dict], options: config.Optimizer) -> dict:
  adamw = optimizer.adamw(options)
  state = adamw.init(params)
  for gradient, rate in zip(gradients, RATES, strict=True):
    updates, state = adamw.update(gradient, state, params)
    params = optax.apply_updates(params, jax.tree.map(lambda u, r=rate: -r * u, updates))
  return flat(params)


@pytest.mark.parametrize(
  'options',
  [
    config.Optimizer(),
    config.Optimizer(weight_decay=0.5, b1=0.7, b2=0.8, epsilon=0.1, clip_norm=2.0),
    config.Optimizer(clip_norm=0),
    config.Optimizer(weight_decay=0),
    config.Optimizer(b1=0, b2=0, epsilon=1.0),
  ],
  ids=str,
)
def test_adamw(options):
  rng = np.random.default_rng(0)
  params = tree(rng)
  # Norms on both sides of the bounds: about 7, and the third and fourth well below 1.
  gradients = [tree(rng, size) for size in (1, 2, 0.02, 0.1, 5)]
  got, want = run(params, gradients, options), reference(params, gradients, options)
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_clipping_makes_a_difference():
  rng = np.random.default_rng(1)
  params = tree(rng)
  gradients = [tree(rng, size) for size in (1, 9, 0.02, 1, 1)]
  clipped = run(params, gradients, config.Optimizer(epsilon=0.1))
  free = run(params, gradients, config.Optimizer(epsilon=0.1, clip_norm=0))
  assert all(np.abs(clipped[name] - free[name]).max() > 1e-3 for name in free)


def test_what_decays(model):
  decayed = optimizer.decayed(transformer.Network(model, config.Compute()).abstract())
  for path, decays in jax.tree_util.tree_leaves_with_path(decayed):
    assert decays == (path[-1].key != 'scale'), path
  spared = [path for path, decays in jax.tree_util.tree_leaves_with_path(decayed) if not decays]
  assert len(spared) == 2, 'the norm of the blocks and the final one'


def test_scales_of_norms_of_heads_do_not_decay(models):
  for model in models.values():
    abstract = transformer.Network(dataclasses.replace(model, qk_norm=True), config.Compute())
    decayed = optimizer.decayed(abstract.abstract())['blocks']['attention']
    assert {name for name, decays in decayed.items() if not decays} == {'query_scale', 'key_scale'}


def test_moments_are_float32():
  state = optimizer.adamw(config.Optimizer()).init(tree(np.random.default_rng(2)))
  # The counter of the bias correction is the one that is not.
  assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {'float32', 'int32'}


def rates(warmup: int, total: int, final: float = 0.1) -> list[float]:
  at = optimizer.learning_rate(config.Schedule(2.0, warmup, final), warmup, total)
  return [at(step) for step in range(total)]


@pytest.mark.parametrize(
  'warmup, total', [(0, 1), (0, 2), (0, 20), (1, 20), (4, 20), (10, 20), (19, 20), (0, 1000)]
)
@pytest.mark.parametrize('final', [0.0, 0.1, 1.0])
def test_learning_rate(warmup, total, final):
  got = rates(warmup, total, final)
  # Update n has seen n + 1 batches: it stands at n + 1 of the schedule, and the last at its end.
  for step, rate in enumerate(got, start=1):
    if step < warmup:
      want = 2.0 * step / warmup
    else:
      cosine = (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
      want = 2.0 * (final + (1 - final) * cosine)
    assert rate == pytest.approx(want, rel=1e-5, abs=1e-6), step
  assert all(isinstance(rate, float) for rate in got)


def test_learning_rate_at_its_corners():
  got = rates(4, 20)
  assert got[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
  assert got[-1] == pytest.approx(0.2)
  assert max(got) == got[3] and sorted(got[3:], reverse=True) == got[3:]
  assert len(set(got[3:])) == 17, 'it falls at every step'


def test_runs_of_one_step_and_runs_that_only_warm_up():
  assert rates(0, 1) == rates(1, 1) == [pytest.approx(0.2)]
  got = rates(5, 5)
  assert got == pytest.approx([0.4, 0.8, 1.2, 1.6, 0.2])


def test_learning_rate_past_the_end_stays():
  at = optimizer.learning_rate(config.Schedule(2.0, 3), 3, 10)
  assert at(9) == at(10) == at(1000) == pytest.approx(0.2)
