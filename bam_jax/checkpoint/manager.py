"""Orbax: checkpoints are written asynchronously, found, and restored on any mesh.

A run's folder holds `<step>/{params,opt_state,data,meta,checksums}`, separate Orbax items; `params`
and `meta`, which `convert` writes beside the tokenizer's file, are a checkpoint too. Orbax makes a
step appear, by a rename, when all of it is written, and only then removes an old one, so a
complete one always exists. In a bucket a step is complete once its last file exists.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from bam_jax import config
from bam_jax.checkpoint import arrays, integrity
from bam_jax.checkpoint.manifest import Manifest
from bam_jax.config import strict
from bam_jax.data.tokenizer import HUGGING_FACE_FILE, SENTENCEPIECE_FILE, Tokenizer, read_file
from bam_jax.errors import UserError
from bam_jax.files import folders, json_file
from bam_jax.model import transformer
from bam_jax.parallel import processes, sharding

FORMAT = 2  # of `meta`, and of the names of the parameters
REMOVED = 'drop_ratio', 'noise'  # options of a merge that mixtures of before may name
SAVE_SECONDS = 3600  # timeout of an asynchronous save


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
  versions: Mapping[str, str]  # of the libraries that wrote it
  bos_token: str  # begins documents
  eos_token: str  # ends them
  manifest: Manifest | None = None  # what it was made from, if not from scratch
  words = property(lambda self: (self.tokenizer_hash, self.bos_token, self.eos_token))


class _ChecksumsHandler(ocp.CheckpointHandler):
  """Writes checksums when the items before it have their names, and the step does not yet."""

  def save(self, directory: epath.Path, args: Any) -> None: ...
  def restore(self, directory: epath.Path, args: Any) -> None: ...

  def finalize(self, directory: epath.Path) -> None:
    integrity.write(directory.parent, directory)


@ocp.args.register_with_handler(_ChecksumsHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _ChecksumsSave(ocp.args.CheckpointArgs):
  pass


class Checkpoints:
  """The checkpoints of one run; writing is asynchronous."""

  def __init__(self, folder: Path, keep: int, keep_every: int = 0):
    """Opens the folder, which need not exist; `integrity.set_aside` comes before.

    It keeps the newest checkpoints, and those of steps that `keep_every` divides, if not 0.
    """
    self.folder = folder
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      keep_period=keep_every or None,
      async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS),
      single_host_load_and_broadcast=True,  # one view of the disk, for all processes
    )
    handlers = {
      # Compressed, float noise is 8% smaller and takes three times as long to read.
      'params': ocp.PyTreeCheckpointHandler(use_compression=False),
      'opt_state': ocp.PyTreeCheckpointHandler(use_compression=False),
      'data': ocp.JsonCheckpointHandler(),
      'meta': ocp.JsonCheckpointHandler(),
      integrity.ITEM: _ChecksumsHandler(),  # the last: Orbax finalizes in this order
    }
    path = folders.absolute(folder)
    self._manager = ocp.CheckpointManager(path, options=options, item_handlers=handlers)
    self._hook, sys.unraisablehook = sys.unraisablehook, self._report

  def latest(self) -> int | None:
    """The newest step, one that is still being written included."""
    return self._manager.latest_step()

  def newest_folder(self) -> Path | None:
    """The folder of the newest step, once everything is on disk; None without one."""
    self.wait()
    step = self.latest()
    return None if step is None else self.folder / str(step)

  def save(self, step: int, params: Any, opt_state: Any, data: dict, meta: Meta) -> None:
    """Starts to write a checkpoint; one that is being written is waited for first.

    UserError when that one could not be written, or this one not begun; so do `wait` and `close`.
    """

    def cut(keys, leaf):  # into chunks that bounded memory can read
      return arrays.save_args(sharding.path_of(keys), arrays.Spec(leaf.shape, np.dtype(leaf.dtype)))

    args = ocp.args.Composite(
      params=ocp.args.PyTreeSave(params, jax.tree_util.tree_map_with_path(cut, params)),
      opt_state=ocp.args.PyTreeSave(opt_state),
      data=ocp.args.JsonSave(data),
      meta=ocp.args.JsonSave(strict.to_dict(meta)),
      checksums=_ChecksumsSave(),
    )
    with arrays.writing(self.folder):
      self._manager.save(step, args=args)

  def restore(self, step: int, params: Any, opt_state: Any) -> tuple[Any, Any, dict]:
    """Parameters, optimizer state and data state of a finished step.

    The arguments' leaves are jax.ShapeDtypeStruct whose shardings say where each array goes.
    UserError when the step is of another format.
    """
    processes.decide(lambda: read_meta(self.folder / str(step)) and None)
    items = {'params': _restore_args(params), 'opt_state': _restore_args(opt_state)}
    args = ocp.args.Composite(**items, data=ocp.args.JsonRestore())
    restored = self._manager.restore(step, args=args)
    return restored['params'], restored['opt_state'], restored['data']

  def wait(self) -> None:
    """Returns when everything is on disk."""
    with arrays.writing(self.folder):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and frees the writer's threads."""
    try:
      with arrays.writing(self.folder):
        self._manager.close()
    finally:
      sys.unraisablehook = self._hook

  def _report(self, unraisable: Any) -> None:
    """Prints an error that a thread of a library cannot raise to anyone."""
    # At the first array that cannot be written Orbax closes a loop that the others report to.
    if str(unraisable.exc_value) != 'Event loop is closed':
      self._hook(unraisable)


def write_meta(folder: epath.Path, meta: Meta) -> None:
  """Writes the item `meta`, which makes a checkpoint of the folder: the last thing to write."""
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
    checkpointer.save(folder / 'meta', ocp.args.JsonSave(strict.to_dict(meta)))
  integrity.write(folder, folder / integrity.ITEM)


def read_meta(path: epath.PathLike) -> Meta:
  """The `meta` of the checkpoint at or below `path`; UserError when this version cannot read it."""
  folder = find(path)
  integrity.check(folder, ['meta'])
  try:
    facts = json_file.load(folder / 'meta' / 'metadata')
  except (OSError, ValueError) as error:
    raise UserError(f'{folder}/meta cannot be read ({error}): the checkpoint is damaged.') from None
  version = facts.get('format') if isinstance(facts, dict) else None
  if version == FORMAT:
    for option in REMOVED:
      ((facts.get('manifest') or {}).get('upcycle') or {}).pop(option, None)
    return strict.from_dict(Meta, facts, str(folder / 'meta'))
  if not isinstance(version, int) or version < 1:
    raise UserError(f'{folder} is not a checkpoint of format {FORMAT}, the one this version reads.')
  fix = 'read it with commit d21418b' if version == 1 else 'upgrade bam_jax'
  raise UserError(f'{folder} has format {version}, and this version reads {FORMAT}: {fix}.')


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
  raise UserError(f'{path} holds no checkpoint: name a run, a step, or an output of convert.')


def find_tokenizer(path: epath.PathLike) -> epath.Path:
  """The tokenizer's file, of the hash in `meta`: beside the checkpoint, or where its data were."""
  folder, meta = find(path), read_meta(path)
  # A converted checkpoint has it inside, a run two folders above its steps.
  places = [folder, folder.parent.parent, epath.Path(meta.tokenizer_path)]
  for place in places:
    for name in (HUGGING_FACE_FILE, SENTENCEPIECE_FILE):
      file = place / name
      if file.exists() and hashlib.sha256(read_file(file)).hexdigest() == meta.tokenizer_hash:
        return file
  raise UserError(
    f'{folder} lacks its tokenizer, SHA-256 {meta.tokenizer_hash[:12]}..., which is not in '
    f'{", ".join(map(str, places))}: copy the file there.'
  )


def open_tokenizer(path: epath.PathLike, meta: Meta) -> Tokenizer:
  """The checkpoint's own tokenizer."""
  return Tokenizer.load(find_tokenizer(path), meta.bos_token, meta.eos_token)


def open_params(path: epath.PathLike, model: config.Model, check: bool = True) -> arrays.Reader:
  """Reads the parameters of a model in regions; UserError when they are damaged or another's."""
  reader = arrays.Reader(find(path) / 'params', check)
  _check_shapes(reader, transformer.Network(model, config.Compute()).abstract())
  return reader


def restore_params(path: epath.PathLike, params: Any) -> Any:
  """The parameters alone of the checkpoint at or below `path`; all processes must call.

  The leaves of `params` are jax.ShapeDtypeStruct whose shardings say where each array goes.
  UserError when the stored ones are damaged, or of another model.
  """
  folder = folders.absolute(find(path))
  processes.decide(lambda: integrity.check(folder, ['params']))
  _check_shapes(arrays.Reader(folder / 'params', check=False), params)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    return checkpointer.restore(folder / 'params', args=_restore_args(params))


def _check_shapes(reader: arrays.Reader, params: Any) -> None:
  """UserError unless a checkpoint has all of a model's arrays, and no others."""
  wanted = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params, sep='/').items()}
  stored = {path: spec.shape for path, spec in reader.specs.items()}
  for path in sorted(stored.keys() | wanted.keys()):
    wrong = f'{reader.folder} has {path} of shape {stored.get(path)} where {wanted.get(path)} is'
    fix = 'expected: it is damaged, or a checkpoint of another model.'
    strict.require(stored.get(path) == wanted.get(path), f'{wrong} {fix}')


def _restore_args(abstract: Any) -> ocp.args.PyTreeRestore:
  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  return ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)
