"""Draws have the probabilities that NumPy computes by sorting; no other word is ever drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bam_jax.errors import UserError
from bam_jax.generate import sampling
from bam_jax.generate.sampling import SamplingParams

DRAWS = 20_000


def scores(size: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(0, 2, size).astype(np.float32)


def expected(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
  """The probabilities of a choice, in float64, by sorting."""
  scaled = logits.astype(np.float64) / params.temperature
  order = np.argsort(-scaled, kind='stable')
  kept = np.zeros(len(scaled), bool)
  kept[order[: params.top_k or None]] = True
  weights = np.where(kept, np.exp(scaled - scaled.max()), 0)
  weights /= weights.sum()
  if params.top_p < 1:
    weights = np.where(before(weights) < params.top_p, weights, 0)
  return weights / weights.sum()


def before(weights: np.ndarray) -> np.ndarray:
  """The mass of what is more probable than each word."""
  return np.array([weights[weights > w].sum() for w in weights])


def drawn(logits: np.ndarray, params: SamplingParams, draws: int = DRAWS) -> np.ndarray:
  """How often each word is drawn, by as many rows."""
  keys = jax.random.split(jax.random.key(5), draws)
  one = lambda key: sampling.sample(
    jnp.asarray(logits)[None], key[None], params.static(), params.temperature, params.top_p
  )[0]
  words = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=1000))(keys)
  return np.bincount(np.asarray(words), minlength=len(logits)) / draws


@pytest.mark.parametrize('params', [
  SamplingParams(1.0, top_k=5), SamplingParams(1.0, top_k=100),  # of 70 words
  SamplingParams(1.0, top_p=0.7), SamplingParams(1.3, top_k=20, top_p=0.6), SamplingParams(1.0),
], ids=str)  # fmt: skip
def test_draws_have_their_probabilities(params):
  logits = scores(70)
  logits[8:16] = -np.inf
  wanted, got = expected(logits, params), drawn(logits, params)
  assert (got[wanted == 0] == 0).all()
  # Six standard deviations of a binomial, and nothing is random: the keys are fixed.
  assert (np.abs(got - wanted) <= 6 * np.sqrt(wanted * (1 - wanted) / DRAWS) + 1e-9).all()


@pytest.mark.parametrize('top_p', [1e-6, 0.1, 0.5, 0.9, 0.999, 0.9999999])
def test_the_words_that_top_p_keeps(top_p):
  rows = np.stack([scores(1000, seed) for seed in range(4)])
  rows[1] = np.round(rows[1])  # a great many equals
  rows[2, 3] = 60  # one word has all the mass
  kept = np.isfinite(jax.jit(sampling.mask_top_p)(rows, jnp.float32(top_p)))
  for row, mask in zip(rows, kept):
    weights = np.exp(row.astype(np.float64) - row.max())
    weights /= weights.sum()
    mass = before(weights)
    sure = np.abs(mass - top_p) > 1e-6  # float32 sums
    np.testing.assert_array_equal(mask[sure], (mass < top_p)[sure])
    assert mask[row.argmax()]


@pytest.mark.parametrize('params, flag', [
  (dict(temperature=-1), '--temperature=-1'), (dict(temperature=1e-38), 'must be 0, or'),
  (dict(temperature=1, top_k=-2), '--top_k=-2'), (dict(temperature=1, top_p=0), '--top_p=0'),
  (dict(top_k=5), '--temperature=1'),
])  # fmt: skip
def test_what_makes_no_sense(params, flag):
  with pytest.raises(UserError, match=flag):
    SamplingParams(**params)
