"""Differences of checkpoints, question by question."""

import math

import numpy as np
import pytest

from bam_jax.tasks import paired


def sample(number, wanted='none', **metrics):
  return {'doc_id': number, 'filter': wanted, **metrics}


def rows(*metrics):
  return {'t': {'metrics': {name: {'value': 0.0, 'stderr': None} for name in metrics}}}


def test_mean_and_error_of_the_differences():
  rng = np.random.default_rng(0)
  first, ours = rng.random(7), rng.random(7)
  order = rng.permutation(7)
  tasks = rows('acc')
  paired.add(
    tasks,
    {'t': [sample(int(n), acc=ours[n]) for n in order]},
    {'t': [sample(n, acc=first[n]) for n in range(7)]},
  )
  measure = tasks['t']['metrics']['acc']
  assert measure['difference'] == pytest.approx((ours - first).mean())
  want = np.std(ours - first, ddof=1) / math.sqrt(7)
  assert measure['difference_stderr'] == pytest.approx(want)


def test_metrics_of_filters_are_kept_apart():
  tasks = rows('em,strict', 'em,loose')
  pair = lambda strict, loose: {'t': [sample(0, 'strict', em=strict), sample(0, 'loose', em=loose)]}
  paired.add(tasks, pair(1, 1), pair(0, 1))
  found = tasks['t']['metrics']
  assert [found[name]['difference'] for name in found] == [1.0, 0.0]
  assert all(measure['difference_stderr'] is None for measure in found.values())  # of one question


def test_what_is_no_mean_has_none():
  """Such as a perplexity, whose samples hold pairs, and what only one of the two was asked."""
  tasks = rows('ppl', 'acc', 'gone')
  paired.add(
    tasks,
    {'t': [sample(0, ppl=(1.0, 2), acc=1.0)]},
    {'t': [sample(0, ppl=(1.0, 2), acc=1.0), sample(1, ppl=(1.0, 2), acc=1.0)]},
  )
  for measure in tasks['t']['metrics'].values():
    assert measure['difference'] is None and measure['difference_stderr'] is None
