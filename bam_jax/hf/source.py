"""Folders of transformers and GGUF files as sources of a mixture, read a tensor at a time."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from bam_jax.checkpoint import arrays
from bam_jax.hf import files, gguf, importing, names
from bam_jax.upcycle import sources


def open_any(path: str) -> sources.Source:
  """Opens a folder of transformers, a GGUF file or a checkpoint of ours; else UserError."""
  folder = Path(path)
  known = (folder / files.CONFIG).is_file() and any(folder.glob('*.safetensors'))
  if not known and folder.suffix != gguf.SUFFIX:
    return sources.open_checkpoint(path)
  meta, words, reader, table = importing.open_folder(path)
  return sources.Source(path, epath.Path(path), meta, Reader(reader, table), lambda: words)


def adapt(
  opened: Sequence[sources.Source], first_rope: bool, untie: bool, length: int
) -> list[sources.Source]:
  """The sources, less unlike each other: what a mixture of them computes must be trained on.

  `first_rope`: all have the first one's rotary positions. `untie`: those whose head is the table
  have a copy of it as a head. `length` is that of all, if it is not 0.
  """
  adapted, first = [], opened[0].meta.model
  for source in opened:
    model, reader = source.meta.model, source.reader
    if first_rope:
      rope = dict(rope_theta=first.rope_theta, rope_scaling=first.rope_scaling)
      model = dataclasses.replace(model, **rope)
    if untie and model.tied_embeddings:
      model, reader = dataclasses.replace(model, tied_embeddings=False), Untied(reader)
    length_of_it = length or source.meta.sequence_length
    meta = dataclasses.replace(source.meta, model=model, sequence_length=length_of_it)
    adapted.append(source._replace(meta=meta, reader=reader))
  return adapted


class Untied:
  """Reads a tied model as if a copy of its table were its head."""

  def __init__(self, reader: sources.Reader):
    shape, dtype = reader.specs['embed/table']
    self._reader = reader
    self.specs = {**reader.specs, 'unembed/kernel': arrays.Spec(shape[::-1], dtype)}

  def read(self, path: str, index: arrays.Index = ()) -> np.ndarray:
    """A region of an array."""
    if path != 'unembed/kernel':
      return self._reader.read(path, index)
    rows, words = (*index, slice(None), slice(None))[:2]
    return np.ascontiguousarray(self._reader.read('embed/table', (words, rows)).T)


class Reader:
  """Reads our arrays, by path, out of a folder's tensors."""

  def __init__(self, reader: files.Reader | gguf.Reader, table: names.Table):
    self._reader, self._table, self._places, self.specs = reader, table, {}, {}
    for name, parts in names.pieces(table).items():
      for path, index, rows in parts:
        self._places[path, index] = name, rows
        self.specs[path] = arrays.Spec(table[path].shape, reader.specs[name].dtype)

  def read(self, path: str, index: arrays.Index = ()) -> np.ndarray:
    """A region of an array: of one layer, or some rows and columns of one without layers."""
    tensor = self._table[path]
    count = len(tensor.stacked)
    name, rows = self._places[path, tuple(index[:count])]
    inside = tuple(index[count:])
    if not count and len(tensor.ours) == 2:  # of embeddings, only the words that are asked for
      inside = (*inside, slice(None), slice(None))[:2]
      words, channels = inside[::-1] if tensor.is_matrix else inside
      part = self._reader.read(name, words)[:, channels]
      return np.ascontiguousarray(part.T if tensor.is_matrix else part)
    is_slice = isinstance(rows, slice)
    array = self._reader.read(name, rows) if is_slice else self._reader.read(name)[rows]
    return names.to_ours(tensor, array, self.specs[path].dtype)[inside]
