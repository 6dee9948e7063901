"""Checkpoints: what the project asks of Orbax, but for `arrays`, which reads and writes in pieces.

A run's folder holds `<step>/{params,opt_state,data,meta}`, separate Orbax items: parameters can be
read without the optimizer, on any mesh, and `meta` alone says what the checkpoint is. `params` and
`meta` are a checkpoint too, and so is what `convert` makes: these two, and the tokenizer's file.
Beside them lie their `checksums`.

Orbax makes a step appear, by a rename, when all of it is written, and only then removes an old one:
at every moment one that is whole is there. In a bucket a step is one when its last file is there.
"""

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from bam_jax import config, errors
from bam_jax.checkpoint import arrays, integrity
from bam_jax.checkpoint.manifest import Manifest
from bam_jax.config import strict
from bam_jax.data.tokenizer import HUGGING_FACE_FILE, SENTENCEPIECE_FILE, read_file
from bam_jax.errors import UserError
from bam_jax.files import folders, json_file
from bam_jax.parallel import processes, sharding

FORMAT = 1
SAVE_SECONDS = 3600  # that a checkpoint may take, beside the training


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
  bos_token: str | None = None  # begins documents; None: a well-known one
  eos_token: str | None = None  # ends them
  manifest: Manifest | None = None  # what it was made from, if not from scratch


class _ChecksumsHandler(ocp.CheckpointHandler):
  """Writes checksums when the items before it have their names, and the step does not yet."""

  def save(self, directory: epath.Path, args: '_ChecksumsSave') -> None:
    pass

  def restore(self, directory: epath.Path, args: '_ChecksumsSave') -> None:
    pass

  def finalize(self, directory: epath.Path) -> None:
    integrity.write(directory.parent, directory)


@ocp.args.register_with_handler(_ChecksumsHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _ChecksumsSave(ocp.args.CheckpointArgs):
  pass


class Checkpoints:
  """The checkpoints of one run; writing is asynchronous."""

  def __init__(self, folder: Path, keep: int):
    """Opens the folder, which need not exist; `integrity.set_aside` comes before."""
    self.folder = folder
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      enable_async_checkpointing=True,
      async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS),
      single_host_load_and_broadcast=True,  # one view of the disk, for all processes
    )
    # Compressed, float noise is 8% smaller and takes three times as long to read.
    handlers = {
      item: ocp.PyTreeCheckpointHandler(use_compression=False) for item in ('params', 'opt_state')
    } | {item: ocp.JsonCheckpointHandler() for item in ('data', 'meta')}
    handlers[integrity.ITEM] = _ChecksumsHandler()  # the last: Orbax finalizes in this order
    self._manager = ocp.CheckpointManager(
      folders.absolute(folder), options=options, item_handlers=handlers
    )
    self._hook, sys.unraisablehook = sys.unraisablehook, self._tell

  def latest(self) -> int | None:
    """The newest finished step."""
    return self._manager.latest_step()

  def newest_folder(self) -> Path | None:
    """The folder of the newest step, once everything is on disk; None without one."""
    self.wait()
    step = self.latest()
    return None if step is None else self.folder / str(step)

  def save(self, step: int, params: Any, opt_state: Any, data: dict, meta: Meta) -> None:
    """Starts to write a checkpoint; one that is being written is waited for first.

    Raises:
      UserError: that one could not be written, or this one not begun; so do `wait` and `close`.
    """
    args = ocp.args.Composite(
      params=_save_args(params),
      opt_state=ocp.args.PyTreeSave(opt_state),
      data=ocp.args.JsonSave(data),
      meta=ocp.args.JsonSave(strict.to_dict(meta)),
      checksums=_ChecksumsSave(),
    )
    with self._writing():
      self._manager.save(step, args=args)

  def restore(self, step: int, params: Any, opt_state: Any) -> tuple[Any, Any, dict]:
    """Parameters, optimizer state and data state of a step.

    Args:
      step: a finished step.
      params: jax.ShapeDtypeStruct leaves whose shardings say where each array goes.
      opt_state: the same.

    Raises:
      UserError: the step is of a newer format, or has not the data state of a run.
    """
    folder = self.folder / str(step)
    processes.decide(lambda: read_meta(folder) and None)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=_restore_args(params),
        opt_state=_restore_args(opt_state),
        data=ocp.args.JsonRestore(),
      ),
    )
    if 'iterator' not in (restored['data'] or {}):
      raise UserError(f'{folder}/data is damaged: delete {folder} to go on from the one before.')
    return restored['params'], restored['opt_state'], restored['data']

  def wait(self) -> None:
    """Returns when everything is on disk."""
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and frees the writer's threads."""
    try:
      with self._writing():
        self._manager.close()
    finally:
      sys.unraisablehook = self._hook

  def _tell(self, unraisable: Any) -> None:
    """Prints an error that a library's thread can raise to nobody."""
    # At the first array that cannot be written Orbax closes a loop that the others report to.
    if str(unraisable.exc_value) != 'Event loop is closed':
      self._hook(unraisable)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    with folders.writing(self.folder):
      try:
        yield
      except (OSError, ValueError) as error:
        if errors.of_jax(error):  # another process was lost
          raise
        raise UserError(f'{self.folder} cannot be written: {arrays.reason(error)}.') from error


def write_meta(folder: epath.Path, meta: Meta) -> None:
  """Writes the item `meta`, which makes a checkpoint of the folder: the last thing to write."""
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
    checkpointer.save(folder / 'meta', ocp.args.JsonSave(strict.to_dict(meta)))
  if not folders.in_bucket(folder):
    (folder / integrity.ITEM).mkdir()
    integrity.write(folder, folder / integrity.ITEM)


def finished_step(folder: Path) -> int | None:
  """The newest finished step below `folder`, without opening a manager; None without one."""
  # A folder that a kill left behind has a longer name until all of it is written.
  steps = {path.parent for path in folder.glob('*/meta') if path.parent.name.isdecimal()}
  return max((int(step.name) for step in steps if folders.is_complete(step)), default=None)


def find(path: epath.PathLike) -> epath.Path:
  """The folder of the checkpoint at `path`: a step, or the newest step of a run; else UserError."""
  path = folders.reach(path)
  if folders.is_complete(path / 'meta') and folders.BESIDE not in path.name:
    return path
  for folder in (path, path / 'checkpoints'):
    step = finished_step(folder)
    if step is not None:
      return folder / str(step)
  raise UserError(f'{path} holds no checkpoint: name a run of a workdir, or one of its steps.')


def find_tokenizer(path: epath.PathLike) -> epath.Path:
  """The tokenizer's file of the checkpoint at or below `path`: beside it, or where its data were.

  Raises:
    UserError: there is none with the hash that `meta` has.
  """
  folder, meta = find(path), read_meta(path)
  # A converted checkpoint has it inside, a run two floors above its steps.
  places = [folder, folder.parent.parent, epath.Path(meta.tokenizer_path)]
  for place in places:
    for name in (HUGGING_FACE_FILE, SENTENCEPIECE_FILE):
      file = place / name
      if file.exists() and hashlib.sha256(read_file(file)).hexdigest() == meta.tokenizer_hash:
        return file
  raise UserError(
    f'{folder} has lost its tokenizer, SHA-256 {meta.tokenizer_hash[:12]}..., which is not in '
    f'{", ".join(map(str, places))}: copy the file there.'
  )


def read_meta(path: epath.PathLike) -> Meta:
  """The `meta` of the checkpoint at or below `path`; UserError when it is not one of ours."""
  folder = find(path)
  integrity.check(folder, ['meta'])
  try:
    facts = json_file.load(folder / 'meta' / 'metadata')
  except (OSError, ValueError) as error:
    raise UserError(f'{folder}/meta cannot be read ({error}): the checkpoint is damaged.') from None
  version = facts.get('format') if isinstance(facts, dict) else None
  if not isinstance(version, int) or not 1 <= version <= FORMAT:
    newer = isinstance(version, int) and version > FORMAT
    raise UserError(
      f'{folder} has format {version}, and this version reads format {FORMAT}: upgrade bam_jax.'
      if newer
      else f'{folder} is not a checkpoint of format {FORMAT}, the one this version reads.'
    )
  return strict.from_dict(Meta, facts, str(folder / 'meta'))


def restore_params(path: epath.PathLike, params: Any) -> Any:
  """The parameters alone of the checkpoint at or below `path`, wherever `params` says they go."""
  return _restore_checked(path, params, _restore_args(params))


def restore_host_params(path: epath.PathLike, params: Any) -> Any:
  """The parameters alone of the checkpoint at or below `path`, as NumPy arrays.

  Args:
    path: of a checkpoint.
    params: shapes and dtypes.
  """
  restore_args = jax.tree.map(
    lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), params
  )
  return _restore_checked(
    path, params, ocp.args.PyTreeRestore(item=params, restore_args=restore_args)
  )


def _restore_checked(path: epath.PathLike, params: Any, args: ocp.args.PyTreeRestore) -> Any:
  """Restores, after comparing what is on disk with what is asked for; Orbax alone may not."""
  whole = folders.absolute(find(path))
  folder = whole / 'params'
  if what := integrity.fault_of_all(whole, ['params']):
    raise integrity.Damaged(whole, what)
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


def _save_args(params: Any) -> ocp.args.PyTreeSave:
  """Saves parameters in chunks that bounded memory can read."""

  def args(keys, leaf):
    return arrays.save_args(sharding.path_of(keys), arrays.Spec(leaf.shape, np.dtype(leaf.dtype)))

  return ocp.args.PyTreeSave(params, jax.tree_util.tree_map_with_path(args, params))


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
