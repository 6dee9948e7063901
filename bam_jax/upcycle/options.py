"""Means of a merge beyond the paper's, and its random draws."""

import zlib
from collections.abc import Sequence

import jax
import numpy as np

from bam_jax import config


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


def generator(key: jax.Array, name: str, *numbers: int) -> np.random.Generator:
  """A NumPy generator seeded by the arguments; it draws on the host, whatever an expert's size."""
  words = np.asarray(jax.random.key_data(key)).tolist()
  return np.random.default_rng([*words, zlib.crc32(name.encode()), *numbers])
