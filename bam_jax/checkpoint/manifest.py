"""How a checkpoint was made: from what, by which rule each of its arrays, with which command."""

import collections
import dataclasses
import datetime
import hashlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np

from bam_jax import config

NEW = -1  # in place of an expert's number: it is none of the mixture before
LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')


@dataclasses.dataclass(frozen=True)
class Source:
  """What arrays were taken from."""

  path: str
  run: str | None = None  # its name, if it is a checkpoint of ours
  step: int | None = None
  hash: str | None = None  # `content_hash` of it; None where it was not computed
  array_hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)  # `Hash` by path


@dataclasses.dataclass(frozen=True)
class Made:
  """One of the checkpoint's arrays, and what it was made from."""

  target: str  # its path
  how: str
  source: str | None  # path or name in every source; None for what is drawn


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Everything that made a checkpoint what it is, apart from training."""

  command: str  # what was typed; '' for a recipe's run, whose WORKDIR/recipe.json has it
  time: str  # when this was written: UTC, ISO 8601
  sources: tuple[Source, ...]  # in the experts' order
  made: tuple[Made, ...]  # every array once; empty if all are the source's as they are
  upcycle: config.Upcycle | None = None  # method and options, if it is a mixture
  seed: int = 0  # of what was drawn,
  name: str = ''  # with this: upcycle.merge.run_key(seed, name)
  grown: 'Grown | None' = None  # if experts were added, dropped or replaced


@dataclasses.dataclass(frozen=True)
class Grown:
  """How a mixture came from another one, by a change of its experts."""

  experts: tuple[int, ...]  # the number that each of them had before; NEW for the last source
  names: tuple[str, ...]  # of the experts before
  manifest: Manifest | None  # of the mixture before


class Hash:
  """A hash of an array's values: SHA-256 of the SHA-256s of its slices along the first axis.

  It depends on the values and the first axis alone, little-endian and in C order, and not on the
  mesh that wrote the array or the chunks that it lies in:

      sha256(b''.join(sha256(part.tobytes()).digest() for part in array)).hexdigest()
  """

  def __init__(self):
    self._slices: dict[int, Any] = collections.defaultdict(hashlib.sha256)

  def update(self, array: np.ndarray, index: tuple[int | slice, ...] = (slice(0, None),)) -> None:
    """Adds a region; those of one slice of the first axis come in the order of its values."""
    first = index[0]
    start = first if isinstance(first, int) else first.start
    parts = array[None] if isinstance(first, int) else array
    # Bytes, since hashlib takes no dtypes such as bfloat16.
    rows = np.ascontiguousarray(parts).reshape(len(parts), -1).view(np.uint8)
    for number, row in enumerate(rows, start):
      self._slices[number].update(row)

  def hexdigest(self) -> str:
    """The hash, once every value was added."""
    digests = (self._slices[number].digest() for number in range(len(self._slices)))
    return hashlib.sha256(b''.join(digests)).hexdigest()


def content_hash(array_hashes: Mapping[str, str]) -> str:
  """One hash of a checkpoint: SHA-256 of the lines `<path> <array's hash>`, sorted by path."""
  lines = ''.join(f'{path} {array_hashes[path]}\n' for path in sorted(array_hashes))
  return hashlib.sha256(lines.encode()).hexdigest()


def versions() -> dict[str, str]:
  """Versions of the libraries that decide numbers."""
  return {library: metadata.version(library) for library in LIBRARIES}


def now() -> str:
  """The time, UTC, in seconds, ISO 8601."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
