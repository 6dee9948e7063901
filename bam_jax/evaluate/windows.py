"""Documents to windows that a model can read, and windows to groups of one shape.

A window is a piece of a document, of which the tokens from `first` on are scored and those before
are what the model conditions on. Every window becomes a row of its own, so that nothing beside its
tokens and its group has a part in its scores. Groups follow from the windows and the device alone:
neither the number of devices nor what is computed at once changes what a group holds.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

SHORTEST = 32  # tokens that the shortest windows are padded to
# Tokens of a group, if a window is not longer alone: what keeps an accelerator busy. On a CPU a
# window is a group, and its scores are the same whatever else is scored.
GROUP_TOKENS = 8192


class Window(NamedTuple):
  """Some consecutive tokens of a document."""

  tokens: np.ndarray  # one more than the model reads: the last one is scored and not read
  first: int  # the first that is scored, at least 1


class Group(NamedTuple):
  """Windows that one device computes together, and the shape that they are padded to."""

  numbers: tuple[int, ...]  # of the windows
  rows: int
  length: int  # tokens that the model reads of a row


def cut(tokens: np.ndarray, length: int, stride: int, first: int = 1) -> Iterator[Window]:
  """Windows that score every token from `first` on exactly once, in order.

  A document that fits is one window. In a longer one each window begins `stride` tokens after the
  one before and scores what that did not reach, with at least `length - stride` tokens, and always
  one, before it.

  Args:
    tokens: of a document, or of a context and its continuation.
    length: tokens that the model reads at once.
    stride: 1 to `length`.
    first: the first token that is scored. What stands before it is dropped, from the left, as far
      as the rest needs the room.
  """
  start, done = max(0, min(first - 1, len(tokens) - length - 1)), first
  while done < len(tokens):
    stop = min(start + length + 1, len(tokens))
    yield Window(tokens[start:stop], done - start)
    start, done = start + stride, stop


def groups(windows: Sequence[Window], length: int, platform: str) -> list[Group]:
  """All windows, in groups of similar length, the longest first.

  Args:
    windows: at most `length + 1` tokens each.
    length: tokens that the model reads at once.
    platform: of the devices.
  """
  buckets: dict[int, list[int]] = {}
  for number, window in enumerate(windows):
    buckets.setdefault(bucket(len(window.tokens) - 1, length), []).append(number)
  made = []
  for size in sorted(buckets, reverse=True):
    rows = 1 if platform == 'cpu' else max(1, GROUP_TOKENS // size)
    numbers = buckets[size]
    made += [Group(tuple(numbers[i : i + rows]), rows, size) for i in range(0, len(numbers), rows)]
  return made


def calls(groups: Sequence[Group], devices: int) -> Iterator[list[Group]]:
  """The groups in order, as many of one shape as there are devices at a time."""
  for _, members in itertools.groupby(groups, lambda group: group.length):
    while call := list(itertools.islice(members, devices)):
      yield call


def bucket(tokens: int, length: int) -> int:
  """What a row of so many tokens is padded to: a power of two, at most `length`."""
  return min(max(SHORTEST, 1 << (tokens - 1).bit_length()), length)


def pad(windows: Sequence[Window], group: Group) -> tuple[np.ndarray, np.ndarray]:
  """A group's tokens, int32 (rows, length + 1), and how many the model reads of each row."""
  tokens_BS = np.zeros((group.rows, group.length + 1), np.int32)
  length_B = np.zeros(group.rows, np.int32)
  for row, number in enumerate(group.numbers):
    tokens = windows[number].tokens
    tokens_BS[row, : len(tokens)] = tokens
    length_B[row] = len(tokens) - 1
  return tokens_BS, length_B
