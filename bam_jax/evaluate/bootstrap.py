"""Confidence intervals by the bootstrap over documents; Efron and Tibshirani, 1993, chapter 13.

The documents of each domain are drawn again, with replacement and as many as there are, and every
number is computed anew from what was drawn. Documents are the units because tokens of one document
are not independent. All checkpoints are judged on the same draws, so the interval of a difference
is of paired differences.

Legend: R resamples, N documents, C columns of sums.
"""

from collections.abc import Iterator

import numpy as np

MAX_COUNTS = 2**22  # in memory at once


def totals(sums_NC: np.ndarray, resamples: int, seed: int, name: str) -> np.ndarray:
  """Column sums over the documents of each resample, float64 (R, C).

  Args:
    sums_NC: of each document.
    resamples: R.
    seed: of the draws.
    name: of the domain: its draws do not depend on what other domains there are.
  """
  parts = [counts_RN @ sums_NC for counts_RN in draws(len(sums_NC), resamples, seed, name)]
  return np.concatenate(parts)


def draws(documents: int, resamples: int, seed: int, name: str) -> Iterator[np.ndarray]:
  """How often each resample has each document, float64, some resamples at a time."""
  rng = np.random.default_rng([seed, *name.encode()])
  step = max(1, MAX_COUNTS // documents)
  for start in range(0, resamples, step):
    rows = min(step, resamples - start)
    chosen = rng.integers(documents, size=(rows, documents))
    chosen += documents * np.arange(rows)[:, None]
    counts = np.bincount(chosen.reshape(-1), minlength=rows * documents)
    yield counts.reshape(rows, documents).astype(np.float64)


def interval(values_R: np.ndarray, confidence: float) -> tuple[float, float]:
  """The percentile interval of a number, given its values on all resamples."""
  tail = (1 - confidence) / 2
  low, high = np.quantile(values_R, [tail, 1 - tail])
  return float(low), float(high)
