"""The decode step of `generate`, compiled for devices that need not be there, and what it costs.

The program is `generator.decode`, which appends up to MAX_STEPS tokens to each row in a call. All
facts are of one token of each row, a full call's over its tokens, with every slot of the cache in
use.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bam_jax.aot import cost, program, report
from bam_jax.aot.topology import Topology
from bam_jax.errors import UserError
from bam_jax.generate import generator
from bam_jax.model import arithmetic, resident
from bam_jax.model.decoder import Decoder
from bam_jax.parallel import sharding


@dataclass(frozen=True)
class Shape:
  """What is decoded."""

  batch_size: int  # rows at once
  context: int  # tokens of a row's prompt and continuation
  dtype: str  # of weights, activations and cache

  @property
  def slots(self) -> int:
    """Of the cache, for each row: as `generate` rounds them up."""
    return generator.bucket(self.context)


def step(
  job: program.Job, shape: Shape, topology: Topology
) -> tuple[program.Compiled | program.TooLarge, dict[str, Any]]:
  """The compiled program and its facts; UserError for what the run's mesh does not suit."""
  mesh, decoder = build(job, shape, topology.devices(), topology.flag)
  compiled = compile_step(decoder, shape, mesh)
  return compiled, facts(job, shape, topology, mesh, decoder, compiled)


def build(
  job: program.Job, shape: Shape, devices: Sequence[Any], where: str
) -> tuple[jax.sharding.Mesh, Decoder]:
  """The run's mesh over the devices, and the model on it.

  Args:
    job: the run.
    shape: what is to be decoded.
    devices: of the topology.
    where: names the topology in messages.

  Raises:
    UserError: the mesh does not use all devices, or does not divide the model or the batch.
  """
  program.check_size(job, devices, where)
  mesh = sharding.make_mesh(job.run.mesh, devices)
  decoder = Decoder(job.model, shape.dtype, mesh)
  key = f'{program.key(job)}.mesh'
  resident.check(decoder.abstract, decoder.layout, key)
  if shape.batch_size % decoder.layout.row_shards:
    raise UserError(
      f'--batch_size={shape.batch_size} is no multiple of the {decoder.layout.row_shards} parts '
      f'into which {key}.data and .fsdp cut it: change one of them.'
    )
  return mesh, decoder


def compile_step(
  decoder: Decoder, shape: Shape, mesh: jax.sharding.Mesh
) -> program.Compiled | program.TooLarge:
  """Compiles the very program that `bam_jax.generate` runs."""
  key = generator.Program(decoder.model, shape.dtype, mesh)
  arguments = generator.abstract_arguments(decoder, shape.batch_size, shape.slots)
  return program.compile_lowered(lambda: generator.decode.lower(key, *_placed(arguments, mesh)))


def _placed(arguments: Any, mesh: jax.sharding.Mesh) -> Any:
  """The arguments on the mesh, where they do not say so themselves: a single device."""
  here = NamedSharding(mesh, P())
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), arguments
  )


def facts(
  job: program.Job,
  shape: Shape,
  topology: Topology,
  mesh: jax.sharding.Mesh,
  decoder: Decoder,
  compiled: program.Compiled | program.TooLarge,
) -> dict[str, Any]:
  """The object that `python -m bam_jax.aot --help` describes, of a decode step."""
  needed = needed_bytes(decoder, shape)
  result = report.what(job, topology, compiled) | {
    'phase': 'decode',
    'dtype': shape.dtype,
    'batch_size': shape.batch_size,
    'context': shape.context,
    'slots': shape.slots,
    'needed_bytes': needed,
  }
  if isinstance(compiled, program.TooLarge):
    return result
  # The arithmetic counts half of the context, a sequence's average; this token sees all of it.
  model_flops = shape.batch_size * arithmetic.forward_flops(job.model, 2 * shape.slots)
  trips = {generator.DECODE_LOOP: generator.MAX_STEPS}
  call = cost.read(compiled.executable.as_text(), topology.size, trips=trips)
  result |= report.costs(topology, mesh, call.part(generator.MAX_STEPS), model_flops)
  speeds = {name: shape.batch_size / result['seconds'][name] for name in report.BOUNDS}
  ratio = result['hbm_bytes'] / sum(needed.values())
  return result | {'hbm_ratio': ratio, 'tokens_per_second': speeds}


def needed_bytes(decoder: Decoder, shape: Shape) -> dict[str, int]:
  """Bytes that a device has to read for a token of each row: `weights` that it holds and `cache`.

  Of the FFN experts those that a batch can visit, at most one for each choice of a row; of an input
  embedding that is not the output's as good as nothing.
  """
  model, layout = decoder.model, decoder.layout
  visited = 1.0
  if model.ffn_experts:
    pairs = shape.batch_size // layout.row_shards * model.ffn_experts.top_k
    visited = min(1.0, pairs / model.ffn_experts.num_experts)
  params, state, *_ = generator.abstract_arguments(decoder, shape.batch_size, shape.slots)
  weights = 0
  for key_path, x in jax.tree_util.tree_leaves_with_path(params):
    path = sharding.path_of(key_path)
    if path in ('blocks/ffn/gate', 'blocks/ffn/up', 'blocks/ffn/down'):
      weights += visited * _bytes(x)
    elif path != 'embed/table' or model.tied_embeddings:
      weights += _bytes(x)
  return {'weights': int(weights), 'cache': sum(map(_bytes, jax.tree.leaves(state.cache)))}


def _bytes(x: jax.ShapeDtypeStruct) -> int:
  """Of a device's part."""
  shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
  return math.prod(shape) * np.dtype(x.dtype).itemsize
