"""What is wrong with a run's checkpoints, and going on from the newest that is whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from bam_jax.checkpoint import checksums
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.parallel import processes

SET_ASIDE = '.damaged'  # in the name of a step's folder that was found damaged


def set_aside(folder: Path) -> list[str]:
  """Renames a run's newest checkpoints as long as they are damaged; a sentence about each.

  All processes must ask; together they read the newest checkpoint once.

  Raises:
    UserError: none is whole; then none is renamed.
  """
  faults: dict[str, str] = {}
  for step in processes.decide(lambda: _numbered(folder)):
    what = fault(folder / step)
    if not what:
      break
    faults[step] = what
  else:
    if faults:
      newest = next(iter(faults))
      raise UserError(
        f'{folder / newest} is damaged ({faults[newest]}), and {folder} holds no other that is '
        f'whole: put a copy in its place, or delete {folder} to train the run from its start.'
      )
  return processes.decide(lambda: [_rename(folder / step, what) for step, what in faults.items()])


def _numbered(folder: Path) -> list[str]:
  """Names of the steps' folders, the newest first, whatever is in them."""
  names = (path.name for path in folder.glob('*') if folders.is_complete(path))
  return sorted((name for name in names if name.isdecimal()), key=int, reverse=True)


def _rename(folder: Path, what: str) -> str:
  aside = folder.with_name(folder.name + SET_ASIDE)
  try:
    folders.remove(aside)
    folder.rename(aside)
  except OSError as error:
    raise UserError(
      f'{folder} is damaged and cannot be renamed: {error.strerror or error}.'
    ) from error
  return f'{folder} is damaged ({what}): it is {aside.name} now, and the one before is taken.'


def fault(folder: epath.PathLike, items: Sequence[str] = ()) -> str:
  """What is wrong with a checkpoint's items, or ''; every process reads its share of the files."""

  def listed() -> dict[str, Any]:
    try:
      if not (folder / 'meta').is_dir():
        return {'fault': 'it has no meta'}
      return {'sums': checksums.read(folder, items)}
    except checksums.Damaged as damaged:
      return {'fault': damaged.what}

  found = processes.decide(listed)
  if 'fault' in found:
    return found['fault']
  mine = dict(list(found['sums'].items())[jax.process_index() :: jax.process_count()])
  return processes.first(checksums.fault(folder, mine) or '')
