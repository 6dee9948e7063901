"""The train step of a run, compiled for devices that need not be there."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.model import transformer
from bam_jax.parallel import sharding
from bam_jax.recipes import graph
from bam_jax.train import stages
from bam_jax.train import step as step_lib

UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclass(frozen=True)
class Job:
  """One run as it is to be compiled; what `graph.resolve` and the recipe say of it."""

  name: str
  model: config.Model
  run: config.Run
  sequence_length: int

  @property
  def sequences_per_chip(self) -> int:
    """Sequences that a device works on at once, one micro-batch."""
    return self.run.batch_size // (self.run.grad_accum_steps * self.run.mesh.batch_shards)

  @property
  def even_rows(self) -> int:
    """Rows that a device's FFN experts get at even load: as many as its own tokens choose."""
    experts = self.model.ffn_experts
    return self.sequences_per_chip * self.sequence_length * (experts.top_k if experts else 1)


@dataclass(frozen=True)
class Memory:
  """Bytes of one device's HBM."""

  arguments: int
  temporaries: int
  outputs: int
  aliased: int  # outputs that take the place of donated arguments

  @property
  def peak(self) -> int:
    return self.arguments + self.temporaries + self.outputs - self.aliased


@dataclass(frozen=True)
class Compiled:
  """A compiled step."""

  executable: jax.stages.Compiled
  memory: Memory
  lower_seconds: float
  compile_seconds: float


@dataclass(frozen=True)
class TooLarge:
  """A step that the compiler refused for want of memory."""

  needed_bytes: int | None  # where the compiler says it
  reason: str
  compile_seconds: float


def job(recipe: config.Recipe, name: str) -> Job:
  """The run of a recipe; UserError for one that it lacks."""
  nodes = graph.resolve(recipe)
  if name not in nodes:
    raise UserError(f'--run names {name!r}; the recipe has {", ".join(nodes)}.')
  return Job(name, nodes[name].model, nodes[name].run, recipe.data.sequence_length)


def with_sequences(job: Job, sequences_per_chip: int) -> Job:
  """The job with so many sequences a device and no accumulation."""
  batch_size = sequences_per_chip * job.run.mesh.batch_shards
  run = dataclasses.replace(job.run, batch_size=batch_size, grad_accum_steps=1)
  return dataclasses.replace(job, run=run)


def make_mesh(job: Job, devices: Sequence[Any], where: str) -> jax.sharding.Mesh:
  """The mesh of a job; UserError when it does not use all the devices or does not suit the model.

  Args:
    job: the run.
    devices: of the topology.
    where: names the topology in messages.
  """
  check_size(job, devices, where, ', or add --search')
  abstract = transformer.Network(job.model, job.run.compute).abstract()
  sharding.check(abstract, job.run.mesh, key(job))
  return sharding.make_mesh(job.run.mesh, devices)


def check_size(job: Job, devices: Sequence[Any], where: str, or_else: str = '') -> None:
  """UserError when the mesh of a job does not use all the devices."""
  if job.run.mesh.size != len(devices):
    raise UserError(
      f'{key(job)}.mesh has {job.run.mesh.size} devices and {where} {len(devices)}: set '
      f'--{key(job)}.mesh.fsdp and the other axes{or_else}.'
    )


def key(job: Job) -> str:
  """What names a job's run on the command line."""
  return f'config.runs.{job.name}'


def compile_step(job: Job, mesh: jax.sharding.Mesh) -> Compiled | TooLarge:
  """Compiles the very step that `bam_jax.main` runs."""
  run = job.run
  staged = stages.of(run)
  step = step_lib.train_step(
    job.model, run.compute, run.loss, run.optimizer, run.grad_accum_steps, mesh, staged
  )
  state = step_lib.abstract_state(job.model, run.compute, run.optimizer, mesh)
  rate = stages.rates(lambda step: 0.0, run.router_warmup_steps)(0)
  # Not under `jax.set_mesh`, as training is: constants that a kernel computes while it is traced
  # would be computed on the mesh's devices, which are not there.
  return compile_lowered(lambda: step.lower(state, abstract_batch(job, mesh), rate))


def compile_lowered(lower: Callable[[], jax.stages.Lowered]) -> Compiled | TooLarge:
  """Compiles what `lower` returns, and takes the time of both."""
  start = time.monotonic()
  lowered = lower()
  lowered_at = time.monotonic()
  try:
    executable = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return TooLarge(*_shortage(str(error)), compile_seconds=time.monotonic() - lowered_at)
  return Compiled(executable, memory(executable), lowered_at - start, time.monotonic() - lowered_at)


def abstract_batch(job: Job, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and shardings of what the loop feeds the step."""
  shape = job.run.batch_size, job.sequence_length
  dtypes = dict.fromkeys(('tokens', 'targets', 'segments', 'positions'), jnp.int32)
  where = sharding.batch(mesh)
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    for name, dtype in (*dtypes.items(), ('weights', jnp.float32))
  }


def memory(executable: jax.stages.Compiled) -> Memory:
  """What the compiler planned for one device."""
  stats = executable.memory_analysis()
  return Memory(
    stats.argument_size_in_bytes,
    stats.temp_size_in_bytes,
    stats.output_size_in_bytes,
    stats.alias_size_in_bytes,
  )


def _shortage(message: str) -> tuple[int | None, str]:
  """Bytes that a refused program needs, as far as the message tells, and its first sentence."""
  needed = None
  for pattern in (r'[Uu]sed ([\d.]+)([KMGT])', r'\(([\d.]+)([KMGT])\)'):
    if needed is None and (found := re.search(pattern, message)):
      needed = int(float(found[1]) * UNITS[found[2]])
  sentence = ' '.join(message.split())
  with contextlib.suppress(ValueError):
    sentence = sentence[sentence.index('Ran out of memory') :]
  return needed, sentence.split(' See ')[0][:300]
