"""The step of a run, to train or to decode, compiled for devices that need not be there."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.aot.topology import Topology
from bam_jax.config.strict import require
from bam_jax.generate import generator
from bam_jax.generate.decode import Decoder
from bam_jax.model import transformer
from bam_jax.parallel import memory, sharding
from bam_jax.train import optimizer
from bam_jax.train import step as step_lib

Compiled = jax.stages.Compiled | str  # or why the compiler refuses: the step does not fit


@dataclass(frozen=True)
class Job:
  """One run as it is to be compiled."""

  name: str
  model: config.Model
  run: config.Run
  sequence_length: int

  @property
  def key(self) -> str:
    """On the command line."""
    return f'config.runs.{self.name}'

  @property
  def sequences_per_chip(self) -> int:
    """Sequences of one micro-batch on one device."""
    return self.run.batch_size // (self.run.grad_accum_steps * self.run.mesh.batch_shards)

  @property
  def even_rows(self) -> int:
    """Rows of a device's FFN experts at even load: as many as its own tokens' assignments."""
    experts = self.model.ffn_experts
    return self.sequences_per_chip * self.sequence_length * (experts.top_k if experts else 1)

  def replace(self, **changes) -> 'Job':
    """The job with other values in its run."""
    return dataclasses.replace(self, run=dataclasses.replace(self.run, **changes))

  def with_sequences(self, sequences_per_chip: int) -> 'Job':
    """The job with so many sequences a device and no accumulation."""
    batch_size = sequences_per_chip * self.run.mesh.batch_shards
    return self.replace(batch_size=batch_size, grad_accum_steps=1)


@dataclass(frozen=True)
class Decode:
  """What is decoded."""

  batch_size: int  # rows at once
  context: int  # tokens of a row's prompt and continuation
  dtype: str  # of weights, activations and cache

  @property
  def slots(self) -> int:
    """Of the cache, for each row: as `generate` rounds them up."""
    return generator.bucket(self.context)


def make_mesh(job: Job, devices: Sequence[Any], topology: Topology) -> jax.sharding.Mesh:
  """The mesh of a job; UserError when it does not use all devices of the topology."""
  size, there = job.run.mesh.size, f'{len(devices)} with --slices={topology.slices}'
  wrong = f'{job.key}.mesh has {size} devices, but --topology={topology.name} has {there}'
  require(size == len(devices), f'{wrong}: set --{job.key}.mesh.fsdp and the other axes.')
  return sharding.make_mesh(job.run.mesh, devices)


def compile_train(job: Job, mesh: jax.sharding.Mesh) -> Compiled:
  """Compiles the step that `bam_jax.main` runs; UserError for a mesh that does not divide it."""
  run, model = job.run, job.model
  sharding.check(transformer.Network(model, run.compute).abstract(), run.mesh, job.key)
  factors, only_new = optimizer.factors_of(run), optimizer.only_new(run)
  how = run.compute, run.loss, run.optimizer, run.grad_accum_steps
  step = step_lib.train_step(model, *how, mesh, factors, only_new=only_new)
  state = step_lib.abstract_state(model, run.compute, run.optimizer, mesh)
  dtypes = dict.fromkeys(('tokens', 'targets', 'segments', 'positions'), jnp.int32)
  dtypes['weights'] = jnp.float32
  shape, where = (run.batch_size, job.sequence_length), sharding.batch(mesh)
  batch = {name: jax.ShapeDtypeStruct(shape, x, sharding=where) for name, x in dtypes.items()}
  rate = jax.ShapeDtypeStruct((2,), jnp.float32)
  # Not under `jax.set_mesh`, as training is: constants that a kernel computes while it is traced
  # would be computed on the mesh's devices, which are not there.
  return compile_lowered(step.lower(state, batch, rate))


def make_decoder(job: Job, decode: Decode, mesh: jax.sharding.Mesh) -> Decoder:
  """The model on the mesh; UserError when the mesh does not divide the model or the batch."""
  decoder = Decoder(job.model, decode.dtype, mesh)
  decoder.check(f'{job.key}.mesh')
  batch_size, parts = decode.batch_size, decoder.layout.row_shards
  wrong = f'--{batch_size=} is not a multiple of the {parts} parts that {job.key}.mesh.data and'
  require(batch_size % parts == 0, f'{wrong} .fsdp split it into: change one of them.')
  return decoder


def compile_decode(decoder: Decoder, decode: Decode, mesh: jax.sharding.Mesh) -> Compiled:
  """Compiles the program with which `bam_jax.generate` decodes MAX_STEPS tokens of each row."""
  program = generator.Program(decoder.model, decode.dtype, mesh)
  here = NamedSharding(mesh, P())  # of a single device, where arguments have no sharding
  placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here)
  arguments = generator.abstract_arguments(decoder, decode.batch_size, decode.slots)
  return compile_lowered(generator.decode.lower(program, *jax.tree.map(placed, arguments)))


def needed_bytes(decoder: Decoder, decode: Decode) -> dict[str, int]:
  """Bytes that a device must read for a token of each row: `weights` that it holds, and `cache`.

  Of the FFN experts those that a batch can visit, at most one for each assignment; of an input
  embedding that is not the output's next to nothing.
  """
  model, visited = decoder.model, 1.0
  if model.ffn_experts:
    assignments = decode.batch_size // decoder.layout.row_shards * model.ffn_experts.top_k
    visited = min(1.0, assignments / model.ffn_experts.num_experts)
  parts = dict.fromkeys(('blocks/ffn/gate', 'blocks/ffn/up', 'blocks/ffn/down'), visited)
  parts |= {} if model.tied_embeddings else {'embed/table': 0}
  params, state, *_ = generator.abstract_arguments(decoder, decode.batch_size, decode.slots)
  weights = sum(
    parts.get(sharding.path_of(key_path), 1) * memory.device_bytes(x)
    for key_path, x in jax.tree_util.tree_leaves_with_path(params)
  )
  return {'weights': int(weights), 'cache': memory.device_bytes(state.cache)}


def compile_lowered(lowered: jax.stages.Lowered) -> Compiled:
  """The program, or why it does not fit; any other error of the compiler is raised."""
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    sentence = ' '.join(str(error).split())
    return sentence[max(0, sentence.find('Ran out of memory')) :].split(' See ')[0][:300]
