"""Folders of safetensors, read one tensor at a time and written in any order; never a pickle."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from bam_jax.checkpoint.arrays import Spec
from bam_jax.errors import UserError
from bam_jax.files import json_file

CONFIG = 'config.json'
INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt')
# What our checkpoints can hold without rounding, by the names that the format has for it.
_DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
_CODES = {name: code for code, name in _DTYPES.items()}


class Reader:
  """The tensors of a folder: one file, or several with an index.

  Attributes:
    files: names of the files, in order.
    specs: shape and dtype of every tensor.
  """

  def __init__(self, folder: Path):
    """Reads the files' headers and no values.

    Raises:
      UserError: there are no such files, they are damaged or hold other tensors than the index
        says, a tensor is there twice, or its dtype is not one that our checkpoints can hold.
    """
    self.folder = folder
    index = _read_index(folder)
    self.files = tuple(sorted(set(index.values()))) if index else (SINGLE,)
    _check_files(folder, self.files)
    self.specs: dict[str, Spec] = {}
    self._file_of: dict[str, str] = {}
    for file in self.files:
      for name, spec in self._header(file):
        if index is not None and name not in index:
          raise UserError(f'{folder / file} has {name}, which {INDEX} does not name.')
        if name in self.specs:
          raise UserError(f'{name} is in {self._file_of[name]} and again in {file} of {folder}.')
        self.specs[name], self._file_of[name] = spec, file
    for name, file in (index or {}).items():
      if self._file_of.get(name) != file:
        raise UserError(f'{folder / file} lacks {name}, which {INDEX} says is there.')

  def read(self, name: str) -> np.ndarray:
    """The values of one tensor, a copy.

    Raises:
      UserError: they cannot be read.
    """
    path = self.folder / self._file_of[name]
    # Opened anew for each tensor: what is mapped counts as memory until the file is closed.
    with _reading(path), safetensors.safe_open(path, 'numpy') as file:
      return file.get_tensor(name)

  def _header(self, name: str) -> Iterator[tuple[str, Spec]]:
    path = self.folder / name
    with _reading(path), safetensors.safe_open(path, 'numpy') as file:
      for tensor in file.keys():
        entry = file.get_slice(tensor)
        code = entry.get_dtype()
        if code not in _DTYPES:
          raise UserError(
            f'{path} has {tensor} in {code}: only {", ".join(_DTYPES)} can be imported.'
          )
        yield tensor, Spec(tuple(entry.get_shape()), np.dtype(_DTYPES[code]))


class Writer:
  """Writes tensors of known shapes into files of bounded size, in any order, each once."""

  def __init__(self, folder: Path, specs: Mapping[str, Spec], max_shard_bytes: int):
    """Plans the files and writes their headers.

    Args:
      folder: exists.
      specs: the tensors, those that belong together one after the other.
      max_shard_bytes: of the values in a file; a larger tensor has a file of its own.

    Raises:
      OSError: the disk is full or cannot be written.
    """
    shards = _plan(specs, max_shard_bytes)
    names = [f'model-{n:05}-of-{len(shards):05}.safetensors' for n in range(1, 1 + len(shards))]
    self.files = tuple(names) if len(shards) > 1 else (SINGLE,)
    self._folder, self._specs = folder, dict(specs)
    self._place: dict[str, tuple[str, int]] = {}  # file and position of what is not yet written
    self._file_of = {name: file for file, shard in zip(self.files, shards) for name in shard}
    for file, shard in zip(self.files, shards):
      self._start(file, shard)

  def write(self, name: str, array: np.ndarray) -> None:
    """Writes the values of a tensor.

    Raises:
      OSError: the disk is full or cannot be written.
      ValueError: the values do not fit its spec, or were written before.
    """
    spec = self._specs[name]
    if array.shape != spec.shape or array.dtype != spec.dtype:
      raise ValueError(f'{name} is {spec}, not {array.dtype}{array.shape}.')
    if name not in self._place:
      raise ValueError(f'{name} is written twice.')
    file, position = self._place.pop(name)
    with open(self._folder / file, 'r+b') as out:
      out.seek(position)
      out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

  def finish(self) -> None:
    """Writes the index; ValueError when a tensor was never written."""
    if self._place:
      raise ValueError(f'{", ".join(self._place)} was not written.')
    if len(self.files) > 1:
      total = sum(spec.nbytes for spec in self._specs.values())
      index = {'metadata': {'total_size': total}, 'weight_map': self._file_of}
      (self._folder / INDEX).write_text(json.dumps(index, indent=1) + '\n', encoding='utf-8')

  def _start(self, file: str, names: Sequence[str]) -> None:
    # Wide dtypes first: readers view a file's values where they lie, and they must lie aligned.
    names = sorted(names, key=lambda name: -self._specs[name].dtype.itemsize)
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}  # transformers insists
    end = 0
    for name in names:
      spec = self._specs[name]
      start, end = end, end + spec.nbytes
      header[name] = {
        'dtype': _CODES[spec.dtype.name],
        'shape': spec.shape,
        'data_offsets': [start, end],
      }
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    values = 8 + len(text)
    for name in names:
      self._place[name] = file, values + header[name]['data_offsets'][0]
    with open(self._folder / file, 'wb') as out:
      out.write(len(text).to_bytes(8, 'little') + text)
      out.truncate(values + end)


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file; UserError when it is missing, no object, or has a key twice."""

  def unique(pairs):
    seen = set()
    for key, _ in pairs:
      if key in seen:
        raise ValueError(f'it has {key!r} twice')
      seen.add(key)
    return dict(pairs)

  try:
    facts = json_file.load(path, unique)
  except (OSError, ValueError) as error:
    reason = error.strerror if isinstance(error, OSError) else error
    raise UserError(f'{path} cannot be read: {reason}.') from None
  if not isinstance(facts, dict):
    raise UserError(f'{path} cannot be read: it is no JSON object.')
  return facts


def _read_index(folder: Path) -> dict[str, str] | None:
  """The file of every tensor, or None where there is a single file and no index."""
  path = folder / INDEX
  if not path.exists():
    return None
  names = read_json(path).get('weight_map')
  if not isinstance(names, dict) or not names:
    raise UserError(f'{path} has no weight_map, which says in which file a tensor is.')
  for tensor, file in names.items():
    # A plain name only: an index must not reach outside its folder.
    if not isinstance(file, str) or not re.fullmatch(r'\w[\w.-]*\.safetensors', file, re.ASCII):
      raise UserError(f'{path} puts {tensor} into {file!r}, which is no file of this folder.')
  return names


def _check_files(folder: Path, files: Sequence[str]) -> None:
  there = {path.name for path in folder.iterdir()}
  lacking = [file for file in files if file not in there]
  pickles = sorted(name for name in there if name.endswith(_PICKLES))
  others = sorted(name for name in there if name.endswith('.safetensors') and name not in files)
  if lacking and pickles and not others:
    raise UserError(
      f'{folder} holds {pickles[0]} and no safetensors: reading a pickle can run code, so save the '
      'model as safetensors first.'
    )
  if lacking:
    others = f', though {others[0]}' if others else ''
    raise UserError(
      f'{folder} holds no {lacking[0]}{others}: --input is a folder as transformers saves it, with '
      f'{SINGLE}, or several files and {INDEX}.'
    )
  if others:
    raise UserError(f'{folder} holds {others[0]} beside what is to be imported: which is it?')


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
  try:
    yield
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f'{path} cannot be read ({error}): it is damaged or cut short.') from None


def _plan(specs: Mapping[str, Spec], most: int) -> list[list[str]]:
  """Which tensors share a file, in order."""
  shards, room = [], 0
  for name, spec in specs.items():
    if not shards or spec.nbytes > room:
      shards.append([])
      room = most
    shards[-1].append(name)
    room -= spec.nbytes
  return shards
