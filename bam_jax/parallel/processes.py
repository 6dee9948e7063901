"""Joint decisions of a job's processes, and their shares of the work; no-ops for a single process.

All hosts see the workdir, but at different times: an answer read from the disk that affects control
flow must come from one process.
"""

import collections
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bam_jax import config, errors
from bam_jax.config.strict import require
from bam_jax.errors import UserError
from bam_jax.parallel import sharding


def decide[T](question: Callable[[], T]) -> T:
  """Broadcasts process 0's answer, a JSON value; all processes must call.

  A UserError is raised in every process.
  """
  if jax.process_count() == 1:
    return question()
  answer = {}
  if jax.process_index() == 0:
    try:
      answer = {'value': question()}
    except Exception as error:
      if not (said := errors.sentence(error)):
        raise
      answer = {'error': said}
  answer = gather(answer)[0]
  if 'error' in answer:
    raise UserError(answer['error'])
  return answer['value']


def same(facts: Any, what: str) -> None:
  """UserError, naming `what`, unless all processes have the same facts (JSON values)."""
  everyone = gather(facts)
  others = [str(process) for process, theirs in enumerate(everyone) if theirs != everyone[0]]
  wrong = f'processes {", ".join(others)} do not have the same {what} as process 0'
  require(not others, f'{wrong}: start all processes with the same flags and files.')


def gather(value: Any) -> list[Any]:
  """The JSON values of all processes, in their order; all must call."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(text.size))
  texts = multihost_utils.process_allgather(np.resize(text, sizes.max()))
  return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes)]


def check_mesh(mesh: config.Mesh, where: str) -> None:
  """UserError if a mesh cannot be used by a job of several processes."""
  if jax.process_count() == 1:
    return
  wrong = f'{where}.mesh has {mesh.size} devices, but the {jax.process_count()} processes have'
  fix = 'the mesh must contain every device of the job.'
  require(mesh.size == jax.device_count(), f'{wrong} {jax.device_count()}: {fix}')
  share_of_batch(sharding.make_mesh(mesh), where)


def share_of_batch(mesh: jax.sharding.Mesh, where: str = 'the run') -> tuple[int, int]:
  """Which part of every batch this process reads, and how many parts there are.

  Processes whose devices hold the same rows, sharded along `tensor`, read the same part.
  """
  rows = collections.defaultdict(set)  # of each process
  places = sharding.batch(mesh).devices_indices_map((mesh.size,))
  for device, (part,) in places.items():
    rows[device.process_index].add(part.indices(mesh.size)[:2])
  parts = sorted({tuple(sorted(held)) for held in rows.values()})
  pieces = [piece for part in parts for piece in part]
  wrong = f'{where}.mesh gives processes overlapping parts of a batch: choose mesh.tensor such that'
  fix = f'it divides the {jax.local_device_count()} devices of a process, or is a multiple of them.'
  distinct = len({len(part) for part in parts}) == 1 and len(pieces) == len(set(pieces))
  require(distinct, f'{wrong} {fix}')
  return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def highest(value: int) -> jax.Array:
  """The maximum of all processes' numbers, on the devices; returns without waiting for it."""
  maximum, numbers = _maximum(value)
  return maximum(numbers)


@functools.cache  # since it is needed every step
def _maximum(value: int) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
  """The function, and its argument: this process's number on each of its devices."""
  mesh = jax.sharding.Mesh(jax.devices(), 'devices')
  own = np.full(jax.local_device_count(), value, np.int32)
  numbers = jax.make_array_from_process_local_data(NamedSharding(mesh, P('devices')), own)
  return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P())), numbers
