"""Folders of transformers and GGUF files as sources of a mixture, read a tensor at a time."""

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


class Reader:
  """Reads our arrays, by path, out of a folder's tensors."""

  def __init__(self, reader: files.Reader | gguf.Reader, table: names.Table):
    self._reader, self._table, self._places, self.specs = reader, table, {}, {}
    for name, parts in names.pieces(table).items():
      for path, index, start, stop in parts:
        self._places[path, index] = name, slice(start, stop)
        self.specs[path] = arrays.Spec(table[path].shape, reader.specs[name].dtype)

  def read(self, path: str, index: arrays.Index = ()) -> np.ndarray:
    """A region of an array: of one layer, or some rows and columns of one without layers."""
    tensor, dtype = self._table[path], self.specs[path].dtype
    count = len(tensor.stacked)
    name, rows = self._places[path, tuple(index[:count])]
    inside = (*index[count:], *[slice(None)] * (len(tensor.ours) - len(index[count:])))
    if count or len(tensor.ours) < 2:
      return names.to_ours(tensor, self._reader.read(name, rows), dtype)[inside]
    # Of embeddings only the words that are asked for are read.
    words = int(tensor.is_matrix)
    start, stop, _ = inside[words].indices(tensor.ours[words])
    shape = [*tensor.ours]
    shape[words] = stop - start
    part = self._reader.read(name, slice(start, stop))
    part = names.to_ours(tensor._replace(ours=tuple(shape)), part, dtype)
    return part[tuple(slice(None) if axis == words else one for axis, one in enumerate(inside))]
