"""Documents to windows that a model can read, and windows to padded batches of few shapes.

Each window is a row of its own: its scores depend on its own tokens and its group alone. A group is
what a device computes at once, and does not depend on the number of devices.

Legend: B rows, S tokens of a row.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

MIN_LENGTH = 32  # tokens that the shortest windows are padded to
# Tokens of a group, if a window is not longer alone: what keeps an accelerator busy. On a CPU a
# window is a group, and its scores are the same whatever else is scored.
GROUP_TOKENS = 8192


class Window(NamedTuple):
  """Some consecutive tokens of a document."""

  tokens: np.ndarray  # one more than the model reads: the last one is scored and not read
  first: int  # the first that is scored, at least 1; the model conditions on those before


class Batch(NamedTuple):
  """Groups of one shape, one for each device, of which the last ones may be missing windows."""

  numbers: tuple[int, ...]  # of the windows, in the order of the rows
  tokens_BS: np.ndarray  # int32
  length_B: np.ndarray  # int32, tokens that the model reads of each row


def cut(tokens: np.ndarray, length: int, stride: int, first: int = 1) -> Iterator[Window]:
  """Windows that score every token from `first` on exactly once, in order.

  A document of at most `length + 1` tokens is one window. In a longer one each begins `stride`
  tokens, 1 to `length`, after the one before and scores what that did not reach. What stands before
  `first` is dropped, from the left, as far as the rest needs the room.
  """
  start, done = max(0, min(first - 1, len(tokens) - length - 1)), first
  while done < len(tokens):
    stop = min(start + length + 1, len(tokens))
    yield Window(tokens[start:stop], done - start)
    start, done = start + stride, stop


def batches(windows: Sequence[Window], length: int, platform: str, devices: int) -> Iterator[Batch]:
  """All windows with others of similar length, longest first; rows are padded to a power of two.

  A window has at most `length + 1` tokens; `devices` of `platform` compute a batch.
  """
  buckets: dict[int, list[int]] = {}
  for number, window in enumerate(windows):
    power = 1 << (len(window.tokens) - 2).bit_length()
    buckets.setdefault(min(max(MIN_LENGTH, power), length), []).append(number)
  for size in sorted(buckets, reverse=True):
    rows = devices * (1 if platform == 'cpu' else max(1, GROUP_TOKENS // size))
    for numbers in itertools.batched(buckets[size], rows):
      tokens_BS, length_B = np.zeros((rows, size + 1), np.int32), np.zeros(rows, np.int32)
      for row, number in enumerate(numbers):
        tokens = windows[number].tokens
        tokens_BS[row, : len(tokens)] = tokens
        length_B[row] = len(tokens) - 1
      yield Batch(numbers, tokens_BS, length_B)
