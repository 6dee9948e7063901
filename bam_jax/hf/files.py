"""Folders of safetensors, read and written one tensor at a time; never a pickle."""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from huggingface_hub import split_state_dict_into_shards_factory

from bam_jax.checkpoint.arrays import Spec
from bam_jax.config.strict import require
from bam_jax.errors import UserError
from bam_jax.files import json_file

Progress = Callable[[int, int], None]  # called with the bytes done and the total
CONFIG = 'config.json'
INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
# The dtypes that our checkpoints can hold without rounding, by their names in the format.
_DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
_CODES = {name: code for code, name in _DTYPES.items()}


class Reader:
  """The tensors of a folder: one file, or several with an index.

  `specs` has the shape and dtype of every tensor.
  """

  def __init__(self, folder: Path):
    """Reads the headers of the files; UserError when they are damaged or contradict the index."""
    self.folder = folder
    self.specs: dict[str, Spec] = {}
    self._file_of: dict[str, str] = {}
    index = _read_index(folder)
    what = f'a model is {SINGLE}, or files with {INDEX}; convert pickles to safetensors first'
    for file in sorted(set(index.values())) or [SINGLE]:
      require((folder / file).exists(), f'{folder} has no {file}: {what}.')
      with _opened(folder / file) as opened:
        for name in opened.keys():
          entry = opened.get_slice(name)
          code, wrong = entry.get_dtype(), f'not in {", ".join(_DTYPES)}'
          require(code in _DTYPES, f'{folder / file} has {name} in {code}, {wrong}.')
          other = self._file_of.setdefault(name, file)
          require(other == file, f'{name} is in {other} and again in {file} of {folder}.')
          self.specs[name] = Spec(tuple(entry.get_shape()), np.dtype(_DTYPES[code]))
    for name in sorted(index.keys() | self._file_of.keys()) if index else ():
      listed, found = index.get(name), self._file_of.get(name)
      require(listed == found, f'{folder / INDEX} maps {name} to {listed}; it is in {found}.')

  def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    """A copy of the values of one tensor, or of some rows; UserError when they cannot be read."""
    # Reopened for each tensor: mapped pages count as memory until the file is closed.
    with _opened(self.folder / self._file_of[name]) as file:
      return file.get_slice(name)[rows]


def plan(specs: dict[str, Spec], max_shard_size: str) -> dict[str, list[str]]:
  """The files to write, each with its tensors in order.

  A tensor larger than `max_shard_size`, such as '5GB', has its own file.
  """
  split = split_state_dict_into_shards_factory(
    specs,
    get_storage_size=lambda spec: spec.nbytes,
    filename_pattern='model{suffix}.safetensors',
    max_shard_size=max_shard_size,
  )
  # Wide dtypes first: readers map a file's values, which must be aligned there.
  return {
    file: sorted(names, key=lambda name: -specs[name].dtype.itemsize)
    for file, names in split.filename_to_tensors.items()
  }


def write(
  folder: Path, shards: dict[str, list[str]], specs: dict[str, Spec], arrays: Iterator[np.ndarray]
) -> None:
  """Writes the files of `plan` and their index; `arrays` are the values, in the same order."""
  for file, names in shards.items():
    # The library's own writer needs all values of a file at once. The format is the length of a
    # header, the header, and the values one after the other.
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}  # transformers requires it
    for name, end in zip(names, itertools.accumulate(specs[name].nbytes for name in names)):
      shape, dtype = specs[name]
      offsets = [end - specs[name].nbytes, end]
      header[name] = {'dtype': _CODES[dtype.name], 'shape': shape, 'data_offsets': offsets}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(folder / file, 'wb') as out:
      out.write(len(text).to_bytes(8, 'little') + text)
      for array in itertools.islice(arrays, len(names)):
        out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  if len(shards) > 1:
    total = sum(spec.nbytes for spec in specs.values())
    where = {name: file for file, names in shards.items() for name in names}
    write_json(folder / INDEX, {'metadata': {'total_size': total}, 'weight_map': where})


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
  """Writes a JSON object, its keys sorted."""
  path.write_text(json.dumps(facts, indent=1, sort_keys=True) + '\n', encoding='utf-8')


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file; UserError if it is missing, or not an object."""
  try:
    facts = json_file.load(path)
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read: {getattr(error, "strerror", error)}.') from None
  require(isinstance(facts, dict), f'{path} is not a JSON object.')
  return facts


def _read_index(folder: Path) -> dict[str, str]:
  """The file of every tensor; {} if there is a single file without an index."""
  path = folder / INDEX
  if not path.exists():
    return {}
  names = read_json(path).get('weight_map')
  listed = bool(names) and isinstance(names, dict)
  require(listed, f'{path} has no weight_map, which lists the file of each tensor.')
  for tensor, file in names.items():
    # A plain name only: an index must not reach outside its folder.
    plain = isinstance(file, str) and re.fullmatch(r'\w[\w.-]*\.safetensors', file, re.ASCII)
    require(plain, f'{path} maps {tensor} to {file!r}, which is not a file of this folder.')
  return names


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
  """A safetensors file; UserError if it, or what is read from it, is damaged."""
  try:
    with safetensors.safe_open(path, 'numpy') as file:
      yield file
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f'{path} cannot be read ({error}): it is damaged or cut short.') from None
