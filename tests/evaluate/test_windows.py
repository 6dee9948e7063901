"""Every token is scored once, with as much before it as is promised."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from bam_jax.evaluate import scorer
from bam_jax.evaluate.scorer import Window

SIZES = st.integers(1, 40)


@hypothesis.given(count=st.integers(2, 200), length=SIZES, stride=SIZES, data=st.data())
def test_each_token_is_scored_once_and_in_order(count, length, stride, data):
  stride = min(stride, length)
  first = data.draw(st.integers(1, count - 1))
  tokens = np.arange(count)
  cut = list(scorer.cut(tokens, length, stride, first))
  scored = np.concatenate([window.tokens[window.first :] for window in cut])
  np.testing.assert_array_equal(scored, tokens[first:])
  for number, window in enumerate(cut):
    np.testing.assert_array_equal(window.tokens, np.arange(len(window.tokens)) + window.tokens[0])
    assert 2 <= len(window.tokens) <= length + 1 and window.first >= 1
    # What a window reads before it scores: all there is, or what the stride leaves.
    assert number == 0 or window.first == length + 1 - stride
  assert cut[0].tokens[0] == max(0, min(first - 1, count - length - 1))


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_batches_hold_every_window_once(platform):
  rng = np.random.default_rng(0)
  some = [Window(np.arange(n), 1) for n in rng.integers(2, 4098, 50)]
  groups = {}
  for devices in (1, 3):
    made = list(scorer.batches(some, 4096, platform, devices))
    assert sorted(number for batch in made for number in batch.numbers) == list(range(50))
    lengths = [batch.tokens_BS.shape[1] - 1 for batch in made]
    assert lengths == sorted(lengths, reverse=True)
    groups[devices] = []
    for batch, length in zip(made, lengths):
      rows = 1 if platform == 'cpu' else 8192 // length
      assert batch.tokens_BS.shape[0] == len(batch.length_B) == devices * rows
      for row, number in enumerate(batch.numbers):
        size = len(some[number].tokens)
        assert batch.length_B[row] == size - 1 <= length
        np.testing.assert_array_equal(batch.tokens_BS[row, :size], some[number].tokens)
      assert not batch.length_B[len(batch.numbers) :].any()
      groups[devices] += itertools.batched(batch.numbers, rows)
  assert groups[1] == groups[3]
