"""What a merge may do beyond the paper, one piece at a time; all of it is off by default.

What is drawn depends on an array's path, the key and the options alone.

Legend: D model, F FFN hidden.
"""

import zlib
from collections.abc import Sequence

import jax
import numpy as np

from bam_jax import config

# The axis of F in one expert's matrix.
HIDDEN_AXIS = {'blocks/ffn/gate': 1, 'blocks/ffn/up': 1, 'blocks/ffn/down': 0}


def average(arrays: Sequence[np.ndarray], upcycle: config.Upcycle) -> np.ndarray:
  """What becomes of an array without experts.

  'mean' is the paper's uniform mean. 'weighted' is the mean by `weights`, which need not add up to
  1; model soups, arXiv 2203.05482. 'first' is the first source's array; FlexOlmo, arXiv 2507.07024.
  """
  if upcycle.average == 'first':
    return arrays[0].copy()
  if upcycle.average == 'mean':
    return sum(arrays[1:], start=arrays[0]) / len(arrays)
  total = sum(upcycle.weights)
  terms = [array * (weight / total) for array, weight in zip(arrays, upcycle.weights)]
  return sum(terms[1:], start=terms[0])


def drop(
  path: str, matrix: np.ndarray, layer: int, expert: int, upcycle: config.Upcycle, key: jax.Array
) -> np.ndarray:
  """Draws a part of a copied FFN expert anew; Drop-Upcycling, arXiv 2502.19261.

  For each layer and expert `drop_ratio * F` hidden dimensions (to the nearest whole number) are
  chosen, the same for the expert's three matrices: columns of `gate` and `up`, rows of `down`. In
  each matrix these weights are replaced by draws from a normal distribution with the mean and the
  standard deviation that they had together. Method 'sparse' does so to every expert, as in the
  article; other methods to the experts past the sources.

  Args:
    path: of the array; nothing happens to arrays other than the three.
    matrix: DF or FD, of one layer and one expert; it is not changed.
    layer: its number.
    expert: its number.
    upcycle: the options.
    key: of the whole merge.
  """
  experts = range(upcycle.experts) if upcycle.method == 'sparse' else upcycle.copies
  if not upcycle.drop_ratio or path not in HIDDEN_AXIS or expert not in experts:
    return matrix
  matrix = matrix.copy()
  rows_FD = np.moveaxis(matrix, HIDDEN_AXIS[path], 0)  # a view
  chosen = dropped(layer, expert, len(rows_FD), upcycle.drop_ratio, key)
  if chosen.size:
    old = rows_FD[chosen].astype(np.float32)
    fresh = _rng(key, f'{path}/drop', layer, expert).standard_normal(old.shape, np.float32)
    rows_FD[chosen] = old.mean() + old.std() * fresh
  return matrix


def dropped(layer: int, expert: int, size: int, ratio: float, key: jax.Array) -> np.ndarray:
  """The hidden dimensions of one expert that `drop` draws anew, in order."""
  rng = _rng(key, 'blocks/ffn/dropped', layer, expert)
  return np.sort(rng.choice(size, round(ratio * size), replace=False))


def add_noise(
  path: str, array: np.ndarray, layer: int, expert: int, upcycle: config.Upcycle, key: jax.Array
) -> np.ndarray:
  """Adds Gaussian noise to a copied expert; the baseline "noise" of arXiv 2502.19261.

  The noise's standard deviation is `noise` times that of the array. Every array of the experts past
  the sources gets it, attention's as well as the FFN's. The arguments are those of `drop`.
  """
  if not upcycle.noise or expert not in upcycle.copies:
    return array
  copy = array.astype(np.float32)
  draw = _rng(key, f'{path}/noise', layer, expert).standard_normal(copy.shape, np.float32)
  return copy + upcycle.noise * copy.std() * draw


def _rng(key: jax.Array, name: str, *numbers: int) -> np.random.Generator:
  # NumPy draws where the arrays lie: on the host, however large an expert is.
  words = np.asarray(jax.random.key_data(key)).tolist()
  return np.random.default_rng([*words, zlib.crc32(name.encode()), *numbers])
