"""The bootstrap against a loop over documents, and against what theory says of a mean."""

import numpy as np

from bam_jax.evaluate import comparison


def test_totals_are_those_of_a_loop():
  sums_NC = np.random.default_rng(0).normal(size=(13, 3))
  totals_RC = comparison.resampled(sums_NC, 10, 7, 'law')
  counts = comparison.resampled(np.eye(13), 10, 7, 'law')
  assert totals_RC.shape == (10, 3) and len(counts) == 10
  for total_C, count_N in zip(totals_RC, counts):
    assert count_N.sum() == 13 and (count_N >= 0).all()
    drawn = np.repeat(sums_NC, count_N.astype(int), axis=0)
    np.testing.assert_allclose(total_C, drawn.sum(0), rtol=1e-12)


def test_the_interval_of_a_mean_is_what_theory_says():
  values_N = np.random.default_rng(1).normal(3, 2, size=400)
  draws_R = comparison.resampled(values_N[:, None], 4000, 0, 'x')[:, 0] / 400
  reach = 1.96 * values_N.std() / 20 * np.array([-1, 1])
  interval = np.quantile(draws_R, [0.025, 0.975])
  np.testing.assert_allclose(interval, values_N.mean() + reach, atol=0.02)
