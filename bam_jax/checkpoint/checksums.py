"""Checksums of a checkpoint's files: they notice what its formats do not, such as a flipped bit.

Arrays are stored as they are, and nothing in their files vouches for their values. So
`<checkpoint>/checksums/crc32.json` has, of every file of the other items, the size and the CRC-32.
To write or check it costs one reading of the files, and 0.2 s of one core for a GB.
A checkpoint without it is believed: one of an older version, or one that was written to a bucket,
where the store vouches for what it holds.
"""

import concurrent.futures
import json
import os
import stat
import zlib
from collections.abc import Collection, Iterable

from etils import epath

from bam_jax.errors import UserError
from bam_jax.files import folders, json_file

ITEM = 'checksums'
FILE = 'crc32.json'
PIECE_BYTES = 2**18
THREADS = 4

Sums = dict[str, tuple[int, int]]  # of each file by its path: bytes, CRC-32


class Damaged(UserError):
  """A checkpoint is not what was written."""

  def __init__(self, folder: epath.PathLike, what: str):
    super().__init__(
      f'{folder} is damaged ({what}): restore it from a copy; or delete it, and what wrote it can '
      'write it again.'
    )
    self.what = what


def measure(folder: epath.PathLike, names: Collection[str]) -> Sums:
  """Sizes and checksums of files below a folder; OSError when one cannot be read."""
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    return dict(zip(names, pool.map(lambda name: _sum(os.path.join(folder, name)), names)))


def write(folder: epath.PathLike, into: epath.PathLike) -> None:
  """Writes the checksums of all items below a folder as the file `into`/FILE; none in a bucket.

  When it returns, all of them are on disk: the checkpoint before may be removed next.
  """
  if folders.in_bucket(folder):
    return
  names = [
    os.path.relpath(os.path.join(parent, name), folder)
    for item in sorted(os.listdir(folder))
    if not item.startswith(ITEM)
    for parent, _, files in sorted(os.walk(os.path.join(folder, item)))
    for name in sorted(files)
  ]
  text = json.dumps(measure(folder, names))
  with open(os.path.join(into, FILE), 'w', encoding='utf-8') as file:
    file.write(text + '\n')
  folders.sync(folder)


def read(folder: epath.PathLike, items: Collection[str] = ()) -> Sums:
  """The checksums of a checkpoint's files, empty where there are none.

  Args:
    folder: of the checkpoint.
    items: which; empty is all.

  Raises:
    Damaged: the list of them cannot be read.
  """
  if folders.in_bucket(folder):
    return {}
  path = os.path.join(folder, ITEM, FILE)
  try:
    listed = json_file.load(epath.Path(path))
    sums = {name: (int(size), int(crc)) for name, (size, crc) in listed.items()}
    for name in sums:
      if os.path.isabs(name) or '..' in name.split('/'):
        raise ValueError(f'{name!r} leads out of the checkpoint')
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
    raise Damaged(folder, f'{ITEM}/{FILE} cannot be read: {error}') from None
  return {k: v for k, v in sums.items() if not items or k.split('/')[0] in items}


def fault(folder: epath.PathLike, sums: Sums) -> str | None:
  """What is wrong with one of the files, in a few words; None when all are as they were written."""
  for name, (size, _) in sums.items():
    try:
      facts = os.stat(os.path.join(folder, name))
    except OSError as error:
      return f'{name}: {error.strerror}'
    except ValueError as error:  # NUL, or half a surrogate pair
      return f'{name!r} names no file: {error}'
    if not stat.S_ISREG(facts.st_mode):  # a device could be read for ever
      return f'{name} is not a file'
    if (found := facts.st_size) != size:
      return f'{name} has {found} bytes and not {size}'
  try:
    found = measure(folder, sums)
  except OSError as error:
    return f'{error.filename or "a file"}: {error.strerror}'
  # Another process may have sent the sums, as lists.
  wrong = [name for name in sums if found[name] != tuple(sums[name])]
  return f'{wrong[0]} has other bytes than were written' if wrong else None


def check(folder: epath.PathLike, items: Iterable[str]) -> None:
  """Damaged unless the files of some items are as they were written."""
  if what := fault(folder, read(folder, tuple(items))):
    raise Damaged(folder, what)


def _sum(path: str) -> tuple[int, int]:
  # One small buffer, which a core's cache keeps: new memory for every piece costs more than sums.
  size, crc, piece = 0, 0, memoryview(bytearray(PIECE_BYTES))
  with open(path, 'rb', buffering=0) as file:
    while count := file.readinto(piece):
      size, crc = size + count, zlib.crc32(piece[:count], crc)
  return size, crc
