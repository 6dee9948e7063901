"""Confidence intervals by the bootstrap over documents; Efron and Tibshirani, 1993, chapter 13.

Documents of each domain are drawn with replacement, as many as there are: the tokens of one are not
independent. All checkpoints are judged on the same draws, so differences are paired.

Legend: R resamples, N documents, C columns of sums.
"""

import numpy as np


def totals(sums_NC: np.ndarray, resamples: int, seed: int, name: str) -> np.ndarray:
  """Column sums over the documents of each resample, float64 (R, C).

  The draws of a domain depend on the seed and its name, not on what other domains there are.
  """
  rng, size = np.random.default_rng([seed, *name.encode()]), len(sums_NC)
  draws = (rng.integers(size, size=size) for _ in range(resamples))
  counts = (np.bincount(chosen, minlength=size).astype(np.float64) for chosen in draws)
  return np.stack([count_N @ sums_NC for count_N in counts])


def interval(values_R: np.ndarray, confidence: float) -> tuple[float, float]:
  """The percentile interval of a number, given its values on all resamples."""
  tail = (1 - confidence) / 2
  low, high = np.quantile(values_R, [tail, 1 - tail])
  return float(low), float(high)
