"""Compiled steps on disk."""

import pickle
from pathlib import Path

import jax
from jax.experimental import serialize_executable

from bam_jax.aot.program import Compiled, TooLarge
from bam_jax.errors import UserError


def executable(compiled: Compiled | TooLarge, path: str) -> None:
  """Writes what `load` reads on the TPU; the pickle of bytes and of two trees' structures."""
  step = _fitting(compiled, f'--save={path}')
  _write(path, 'save', pickle.dumps(serialize_executable.serialize(step.executable)))


def load(path: str, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
  """The step that `executable` wrote, ready to be called.

  The file is a pickle: load only what you wrote.

  Args:
    path: the file.
    mesh: like the one that the step was compiled for, of devices that are there.
  """
  serialized, in_tree, out_tree = pickle.loads(Path(path).read_bytes())
  return serialize_executable.deserialize_and_load(
    serialized, in_tree, out_tree, execution_devices=list(mesh.devices.flat)
  )


def text(compiled: Compiled | TooLarge, path: str) -> None:
  """Writes the optimized HLO."""
  step = _fitting(compiled, f'--hlo={path}')
  _write(path, 'hlo', step.executable.as_text().encode())


def _fitting(compiled: Compiled | TooLarge, flag: str) -> Compiled:
  if isinstance(compiled, TooLarge):
    raise UserError(f'{flag} has nothing to write: the step does not fit.')
  return compiled


def _write(path: str, flag: str, content: bytes) -> None:
  try:
    Path(path).write_bytes(content)
  except OSError as error:
    raise UserError(f'--{flag}={path} cannot be written: {error.strerror}.') from error
