"""Options of a merge beyond the paper, one matrix at a time; all are off by default."""

import zlib
from collections.abc import Sequence

import jax
import numpy as np

from bam_jax import config

# The axis of the hidden dimensions in one expert's array.
HIDDEN_AXIS = {
  'blocks/ffn/gate': 1, 'blocks/ffn/up': 1, 'blocks/ffn/down': 0, 'blocks/ffn/gate_bias': 0,
  'blocks/ffn/up_bias': 0,
}  # fmt: skip


def average(arrays: Sequence[np.ndarray], upcycle: config.Upcycle) -> np.ndarray:
  """Averages an array without experts over the sources.

  'mean' is the paper's uniform mean. 'weighted' is the mean by `weights`, which need not add up to
  1; model soups, arXiv 2203.05482. 'first' is the first source's array; FlexOlmo, arXiv 2507.07024.
  """
  if upcycle.average == 'first':
    return arrays[0].copy()
  if upcycle.average == 'mean':
    return sum(arrays[1:], start=arrays[0]) / len(arrays)
  shares = np.asarray(upcycle.weights) / max(upcycle.weights)  # whose sum cannot overflow
  terms = [array * share for array, share in zip(arrays, (shares / shares.sum()).tolist())]
  return sum(terms[1:], start=terms[0])


def expert(
  path: str, matrix: np.ndarray, layer: int, number: int, upcycle: config.Upcycle, key: jax.Array
) -> np.ndarray:
  """One expert's float32 array of one layer: its source's `matrix`, or changed where it is a copy.

  `drop_ratio`: this share of an FFN expert's hidden dimensions is redrawn, in each array from a
  normal distribution with the mean and standard deviation of the weights it replaces. Method
  'sparse' applies this to every expert; Drop-Upcycling, arXiv 2502.19261.

  `noise`: Gaussian noise of this many of the array's standard deviations is added to every array of
  the copied experts; the baseline of the same article.

  The draws depend on path, layer, expert number and key.
  """
  dropping = range(upcycle.experts) if upcycle.method == 'sparse' else upcycle.copies
  if upcycle.drop_ratio and path in HIDDEN_AXIS and number in dropping:
    matrix = matrix.copy()
    rows = np.moveaxis(matrix, HIDDEN_AXIS[path], 0)  # a view, hidden dimensions first
    chosen = dropped(layer, number, len(rows), upcycle.drop_ratio, key)
    if chosen.size:
      old = rows[chosen].astype(np.float32)
      fresh = generator(key, f'{path}/drop', layer, number).standard_normal(old.shape, np.float32)
      rows[chosen] = old.mean() + old.std() * fresh
  if upcycle.noise and number in upcycle.copies:
    draw = generator(key, f'{path}/noise', layer, number).standard_normal(matrix.shape, np.float32)
    matrix = matrix + upcycle.noise * matrix.std() * draw
  return matrix


def dropped(layer: int, expert: int, size: int, ratio: float, key: jax.Array) -> np.ndarray:
  """The hidden dimensions to redraw, sorted; the same for all of an expert's arrays."""
  rng = generator(key, 'blocks/ffn/dropped', layer, expert)
  return np.sort(rng.choice(size, round(ratio * size), replace=False))


def generator(key: jax.Array, name: str, *numbers: int) -> np.random.Generator:
  """A NumPy generator seeded by the arguments; it draws on the host, whatever an expert's size."""
  words = np.asarray(jax.random.key_data(key)).tolist()
  return np.random.default_rng([*words, zlib.crc32(name.encode()), *numbers])
