"""One-dimensional .npy files, read in parts.

They are read and not mapped into memory: a file that is cut short while it is mapped ends the
process without a word, and one that is read gives less than was asked for.
"""

import os
import weakref
from typing import NamedTuple

import numpy as np

from bam_jax.errors import UserError


class Descriptor:
  """An open file, closed when nobody holds it any more."""

  def __init__(self, path: str):
    self.number = os.open(path, os.O_RDONLY)
    weakref.finalize(self, os.close, self.number)


class Column(NamedTuple):
  """One .npy file of a shard."""

  path: str
  dtype: np.dtype
  offset: int  # of the values in the file

  def read(self, descriptor: Descriptor, start: int, stop: int) -> np.ndarray:
    """The values from `start` to `stop`, exclusive; UserError when the file has become shorter."""
    size = self.dtype.itemsize
    pieces, at, end = [], self.offset + start * size, self.offset + stop * size
    while at < end:
      try:
        piece = os.pread(descriptor.number, end - at, at)
      except OSError as error:
        raise UserError(f'{self.path} cannot be read: {error.strerror}.') from error
      if not piece:
        raise UserError(
          f'{self.path} has been cut short since it was opened: prepare the dataset anew.'
        )
      pieces.append(piece)
      at += len(piece)
    return np.frombuffer(b''.join(pieces), self.dtype)


def open_file(path: str) -> Descriptor:
  """Opens a file to read; UserError when it cannot be."""
  try:
    return Descriptor(path)
  except FileNotFoundError as error:
    raise UserError(f'{path} is missing: prepare the dataset anew.') from error
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}.') from error


def open_column(path: str, dtype: np.dtype, size: int) -> Column:
  """A file that holds `size` values of a dtype; UserError when it does not."""
  descriptor = open_file(path)
  try:
    with open(descriptor.number, 'rb', closefd=False) as file:
      version = np.lib.format.read_magic(file)
      shape, _, found = np.lib.format.read_array_header_1_0(file)
      offset = file.tell()
    if version != (1, 0) or found.hasobject:
      raise ValueError
    room = os.fstat(descriptor.number).st_size - offset
  except (OSError, ValueError, EOFError) as error:
    raise UserError(f'{path} is cut short or no array: prepare the dataset anew.') from error
  if found != dtype or shape != (size,):
    raise UserError(
      f'{path} holds {found}{list(shape)} where the manifest promises {dtype}[{size}]: prepare the '
      'dataset anew.'
    )
  if room < size * dtype.itemsize:
    raise UserError(f'{path} is cut short or no array: prepare the dataset anew.')
  return Column(path, dtype, offset)
