"""Checksums of a checkpoint's files; resuming from the newest intact checkpoint.

Arrays have no checksums of their own: a flipped bit would be restored unnoticed. So
`<checkpoint>/checksums/crc32.json` holds the size and CRC-32 of every file of the other items.
Writing or checking it requires reading each file once, and 0.2 s of one core per GB. Buckets
guarantee integrity: checkpoints written to one have no checksums and are not checked, even where
they were copied to a disk.
"""

import concurrent.futures
import json
import os
import zlib
from collections.abc import Collection
from pathlib import Path

from etils import epath

from bam_jax.errors import UserError
from bam_jax.files import folders, json_file

ITEM = 'checksums'
FILE = 'crc32.json'
SET_ASIDE = '.damaged'  # in the name of a step's folder that was found damaged
BLOCK_BYTES = 2**18
THREADS = 4

Sums = dict[str, tuple[int, int]]  # of each file by its path: bytes, CRC-32


class Damaged(UserError):
  """A checkpoint is not what was written; `what` says why."""

  def __init__(self, folder: epath.PathLike, what: str):
    fix = 'restore a copy, or delete it and create it again.'
    super().__init__(f'{folder} is damaged ({what}): {fix}')
    self.what = what


def write(folder: epath.PathLike, into: epath.PathLike) -> None:
  """Writes the checksums of all items below a folder as the file `into`/FILE; none in a bucket.

  When it returns, all of them are on disk: the checkpoint before may be removed next.
  """
  if folders.in_bucket(folder):
    return
  # Files beside the items are Orbax's own, which it changes later.
  files = [path for path in sorted(Path(folder).glob('*/**/*')) if path.is_file()]
  names = [str(path.relative_to(folder)) for path in files]
  sums = _measure(folder, [name for name in names if not name.startswith(ITEM)])
  Path(into).mkdir(exist_ok=True)
  Path(into, FILE).write_text(json.dumps(sums) + '\n', encoding='utf-8')
  folders.sync(folder)


def read(folder: epath.PathLike, items: Collection[str] = ()) -> Sums:
  """The checksums of some items' files, by default all, or {} without a list; may raise Damaged."""
  if folders.in_bucket(folder):
    return {}
  try:
    listed = json_file.load(Path(folder, ITEM, FILE))
    sums = {name: (int(size), int(crc)) for name, (size, crc) in listed.items()}
    for name in sums:
      if os.path.isabs(name) or '..' in name.split('/'):
        raise ValueError(f'{name!r} points outside the checkpoint')
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
    raise Damaged(folder, f'{ITEM}/{FILE} cannot be read: {error}') from None
  return {name: sum_ for name, sum_ in sums.items() if not items or name.split('/')[0] in items}


def check(folder: epath.PathLike, items: Collection[str] = ()) -> None:
  """Raises Damaged unless the files of some items, by default all, are as they were written."""
  sums = read(folder, items)
  try:
    for name, (size, _) in sums.items():  # first, since a file may have become endless
      if (found := os.path.getsize(os.path.join(folder, name))) != size:
        raise Damaged(folder, f'{name} has {found} bytes instead of {size}')
    found = _measure(folder, sums)
  except OSError as error:
    raise Damaged(folder, f'{error.filename or folder!r}: {error.strerror}') from None
  except ValueError as error:  # NUL, or half a surrogate pair
    raise Damaged(folder, f'{name!r}: {error}') from None
  for name in sums:
    if found[name] != sums[name]:
      raise Damaged(folder, f'{name} does not match its checksum')


def set_aside(folder: Path) -> list[str]:
  """Renames a run's newest checkpoints as long as they are damaged; returns a message for each.

  One process must decide for all. UserError when none is whole; then none is renamed.
  """
  names = (path.name for path in folder.glob('*') if folders.is_complete(path))
  steps = sorted((name for name in names if name.isdecimal()), key=int, reverse=True)
  faults: dict[str, str] = {}
  for step in steps:
    try:
      if not (folder / step / 'meta').is_dir():
        raise Damaged(folder / step, 'it has no meta')
      check(folder / step)
      break
    except Damaged as damaged:
      faults[step] = damaged.what
  if steps and len(faults) == len(steps):
    wrong = f'{folder / steps[0]} is damaged ({faults[steps[0]]}), and {folder} has no intact one'
    fix = f'restore a copy, or delete {folder} to train the run from scratch.'
    raise UserError(f'{wrong}: {fix}')
  return [_rename(folder / step, what) for step, what in faults.items()]


def _rename(folder: Path, what: str) -> str:
  aside = folder.with_name(folder.name + SET_ASIDE)
  with folders.writing(aside):
    epath.Path(aside).rmtree(missing_ok=True)
    folder.rename(aside)
  return f'{folder} is damaged ({what}): renamed to {aside.name}, resuming from the one before.'


def _measure(folder: epath.PathLike, names: Collection[str]) -> Sums:
  """Sizes and checksums of files below a folder; OSError when one cannot be read."""
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    return dict(zip(names, pool.map(lambda name: _sum(os.path.join(folder, name)), names)))


def _sum(path: str) -> tuple[int, int]:
  # One small buffer, which a core's cache keeps: new memory for every block costs more than sums.
  size, crc, block = 0, 0, memoryview(bytearray(BLOCK_BYTES))
  with open(path, 'rb', buffering=0) as file:
    while count := file.readinto(block):
      size, crc = size + count, zlib.crc32(block[:count], crc)
  return size, crc
