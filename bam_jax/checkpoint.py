"""Checkpoints: everything the project asks of Orbax.

A run's folder holds `<step>/{params,opt_state,data,meta}`, separate Orbax items: parameters can be
read without the optimizer, on any mesh, and `meta` alone says what the checkpoint is.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from bam_jax import config, strict
from bam_jax.errors import UserError

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Meta:
  """What a checkpoint is: all that is needed to use it without the recipe that made it."""

  format: int
  model: config.Model
  sequence_length: int  # T that it was trained at
  tokenizer_hash: str  # sha256 of the tokenizer's file
  tokenizer_path: str  # a folder that held it
  run: str
  step: int
  method: str | None  # how a mixture was made
  sources: tuple[str, ...]  # its experts' sources, in the experts' order
  versions: dict[str, str]  # of the libraries that wrote it


class Checkpoints:
  """The checkpoints of one run; writing is asynchronous."""

  def __init__(self, folder: Path, keep: int):
    self.folder = folder
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

  def latest(self) -> int | None:
    """The newest finished step."""
    return self._manager.latest_step()

  def newest_folder(self) -> Path | None:
    """The folder of the newest step, once everything is on disk; None without one."""
    self.wait()
    step = self.latest()
    return None if step is None else self.folder / str(step)

  def save(self, step: int, params: Any, opt_state: Any, data: dict, meta: Meta) -> None:
    """Starts to write a checkpoint; one that is being written is waited for first."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.PyTreeSave(params),
        opt_state=ocp.args.PyTreeSave(opt_state),
        data=ocp.args.JsonSave(data),
        meta=ocp.args.JsonSave(strict.to_dict(meta)),
      ),
    )

  def restore(self, step: int, params: Any, opt_state: Any) -> tuple[Any, Any, dict]:
    """Parameters, optimizer state and data state of a step.

    Args:
      step: a finished step.
      params: jax.ShapeDtypeStruct leaves whose shardings say where each array goes.
      opt_state: the same.
    """
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=_restore_args(params),
        opt_state=_restore_args(opt_state),
        data=ocp.args.JsonRestore(),
      ),
    )
    return restored['params'], restored['opt_state'], restored['data']

  def wait(self) -> None:
    """Returns when everything is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and frees the writer's threads."""
    self._manager.close()


def finished_step(folder: Path) -> int | None:
  """The newest finished step below `folder`, without opening a manager; None without one."""
  # A folder that a kill left behind has a longer name until all of it is written.
  names = (path.parent.name for path in folder.glob('*/meta'))
  return max((int(name) for name in names if name.isdigit()), default=None)


def find(path: str | Path) -> Path:
  """The folder of the checkpoint at `path`: a step, or the newest step of a run; else UserError."""
  path = Path(path)
  if (path / 'meta').is_dir():
    return path
  for folder in (path, path / 'checkpoints'):
    step = finished_step(folder)
    if step is not None:
      return folder / str(step)
  raise UserError(f'{path} holds no checkpoint: name a run of a workdir, or one of its steps.')


def read_meta(path: str | Path) -> Meta:
  """The `meta` of the checkpoint at or below `path`; UserError when it is not one of ours."""
  folder = find(path)
  try:
    facts = json.loads((folder / 'meta' / 'metadata').read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise UserError(f'{folder}/meta cannot be read ({error}): the checkpoint is damaged.') from None
  if not isinstance(facts, dict) or facts.get('format') != FORMAT:
    raise UserError(f'{folder} is not a checkpoint of format {FORMAT}, the one this version reads.')
  return strict.from_dict(Meta, facts, str(folder / 'meta'))


def restore_params(path: str | Path, params: Any) -> Any:
  """The parameters alone of the checkpoint at or below `path`, wherever `params` says they go."""
  return _restore_checked(path, params, _restore_args(params))


def restore_host_params(path: str | Path, params: Any) -> Any:
  """The parameters alone of the checkpoint at or below `path`, as NumPy arrays.

  Args:
    path: of a checkpoint.
    params: shapes and dtypes.
  """
  restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), params)
  return _restore_checked(
    path, params, ocp.args.PyTreeRestore(item=params, restore_args=restore_args)
  )


def _restore_checked(path: str | Path, params: Any, args: ocp.args.PyTreeRestore) -> Any:
  """Restores, after comparing what is on disk with what is asked for; Orbax alone may not."""
  folder = find(path).absolute() / 'params'
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    stored = _shapes(checkpointer.metadata(folder).item_metadata.tree)
    wanted = _shapes(params)
    for name in sorted(stored.keys() | wanted.keys()):
      if stored.get(name) != wanted.get(name):
        raise UserError(
          f'{folder} has {name} of shape {stored.get(name)} where {wanted.get(name)} is wanted: '
          'it is the checkpoint of another model.'
        )
    return checkpointer.restore(folder, args=args)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in flat}


def _restore_args(abstract: Any) -> ocp.args.PyTreeRestore:
  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  return ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)


def abstract(tree: Any, shardings: Any) -> Any:
  """Shapes and dtypes of `tree` at `shardings`: what to restore, and where to."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )
