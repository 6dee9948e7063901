"""Every token is scored once, with as much before it as is promised."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from bam_jax.evaluate import windows
from bam_jax.evaluate.windows import Window

sizes = st.integers(1, 40)


@hypothesis.given(count=st.integers(2, 200), length=sizes, stride=sizes, data=st.data())
def test_each_token_is_scored_once_and_in_order(count, length, stride, data):
  stride = min(stride, length)
  first = data.draw(st.integers(1, count - 1))
  tokens = np.arange(count)
  cut = list(windows.cut(tokens, length, stride, first))
  scored = np.concatenate([window.tokens[window.first :] for window in cut])
  np.testing.assert_array_equal(scored, tokens[first:])
  for number, window in enumerate(cut):
    np.testing.assert_array_equal(window.tokens, np.arange(len(window.tokens)) + window.tokens[0])
    assert 2 <= len(window.tokens) <= length + 1 and window.first >= 1
    # What a window reads before it scores: all there is, or what the stride leaves.
    assert number == 0 or window.first == length + 1 - stride
  assert cut[0].tokens[0] == max(0, min(first - 1, count - length - 1))


def test_a_document_that_fits_is_one_window():
  (window,) = windows.cut(np.arange(9), 8, 3)
  assert window.first == 1 and len(window.tokens) == 9
  assert len(list(windows.cut(np.arange(10), 8, 3))) == 2


def test_a_context_gives_way_to_its_continuation():
  (window,) = windows.cut(np.arange(20), 8, 8, first=16)
  assert window.tokens.tolist() == list(range(11, 20)) and window.first == 5


@pytest.mark.parametrize('tokens, padded', [(1, 32), (32, 32), (33, 64), (64, 64), (65, 100)])
def test_rows_have_few_lengths(tokens, padded):
  assert windows.bucket(tokens, 100) == padded
  assert windows.bucket(min(tokens, 20), 20) == 20  # of a model that reads no more


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_groups_hold_every_window_once(platform):
  rng = np.random.default_rng(0)
  some = [Window(np.arange(n), 1) for n in rng.integers(2, 4098, 50)]
  made = windows.groups(some, 4096, platform)
  assert sorted(n for group in made for n in group.numbers) == list(range(50))
  assert [g.length for g in made] == sorted((g.length for g in made), reverse=True)
  for group in made:
    tokens_BS, length_B = windows.pad(some, group)
    assert tokens_BS.shape == (group.rows, group.length + 1)
    assert group.rows == (1 if platform == 'cpu' else 8192 // group.length)
    for row, number in enumerate(group.numbers):
      size = len(some[number].tokens)
      assert length_B[row] == size - 1 <= group.length
      np.testing.assert_array_equal(tokens_BS[row, :size], some[number].tokens)
    assert not length_B[len(group.numbers) :].any()
  given = list(windows.calls(made, 3))
  assert [group for call in given for group in call] == made
  for call in given:
    assert 1 <= len(call) <= 3 and len({group.length for group in call}) == 1
