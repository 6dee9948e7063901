"""Layouts of a run that a topology allows, and a cheap guess of what each costs.

The guess only orders the layouts and leaves out the hopeless: what is reported is compiled.
"""

import dataclasses
import functools
import itertools
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from bam_jax import config
from bam_jax.account import accounting
from bam_jax.aot.collectives import Collective
from bam_jax.aot.network import Network
from bam_jax.aot.program import Job
from bam_jax.aot.topology import Topology
from bam_jax.errors import UserError
from bam_jax.model import arithmetic, ffn, transformer
from bam_jax.parallel import sharding

REMAT = typing.get_args(typing.get_type_hints(config.Compute)['remat'])  # 'none' first
SLACK = 1.1  # a guess of so much more memory than there is is not compiled


@dataclass(frozen=True)
class Guess:
  """What a layout may cost."""

  seconds_per_token: float
  peak_bytes: float


def layouts(job: Job, topology: Topology, sequences_per_chip: int | None) -> Iterator[Job]:
  """The job under every mesh, remat and number of sequences at once that is legal.

  Only replicas lie in different slices. A batch keeps its size, by accumulation, unless
  `sequences_per_chip` says how many sequences a chip has in a step.
  """
  for mesh in meshes(job.model, topology):
    for run in _batches(job.run, mesh, sequences_per_chip):
      for remat in REMAT:
        compute = dataclasses.replace(run.compute, remat=remat)
        yield dataclasses.replace(job, run=dataclasses.replace(run, compute=compute))


def meshes(model: config.Model, topology: Topology) -> list[config.Mesh]:
  """The meshes of all chips that divide every array of the model."""
  abstract = transformer.Network(model, config.Compute()).abstract()
  experts = model.ffn_experts.num_experts if model.ffn_experts else 1
  found = []
  sizes = [size for size in range(1, topology.size + 1) if topology.size % size == 0]
  for data, expert, tensor in itertools.product(sizes, repeat=3):
    fsdp, rest = divmod(topology.size, data * expert * tensor)
    if rest or not fsdp or data % topology.slices or experts % expert:
      continue
    if model.num_kv_heads % tensor:
      continue
    mesh = config.Mesh(data, fsdp, expert, tensor)
    try:
      sharding.check(abstract, mesh, 'config')
    except UserError:
      continue
    found.append(mesh)
  return found


def _batches(
  run: config.Run, mesh: config.Mesh, sequences_per_chip: int | None
) -> Iterator[config.Run]:
  shards = mesh.batch_shards
  if sequences_per_chip:
    batch_size = sequences_per_chip * shards
    yield dataclasses.replace(run, mesh=mesh, batch_size=batch_size, grad_accum_steps=1)
    return
  if run.batch_size % shards:
    return
  mine = run.batch_size // shards
  for power in range(mine.bit_length()):
    if mine % 2**power == 0:
      yield dataclasses.replace(run, mesh=mesh, grad_accum_steps=mine // 2**power)


def guess(job: Job, topology: Topology, network: Network) -> Guess:
  """The cost of a layout, from the sizes of its arrays.

  Args:
    job: with its layout.
    topology: to run on.
    network: of the topology's devices in the order of the mesh.
  """
  model, run = job.model, job.run
  itemsize = jnp.dtype(run.compute.dtype).itemsize
  layer = arithmetic.total_parts(model)
  attention, swiglu = (part / model.num_layers for part in (layer.attention, layer.ffn))
  held = attention / (run.mesh.expert if model.attention_experts else 1)
  held += swiglu / (run.mesh.expert if model.ffn_experts else 1)
  gathered = itemsize * held / run.mesh.tensor  # one layer's weights, as a device uses them
  tokens = job.sequences_per_chip * job.sequence_length
  residual = itemsize * tokens * model.d_model
  saved, again = _saved(job, tokens, itemsize)
  state = _state_bytes(
    model, dataclasses.replace(run.compute, remat='full'), run.optimizer, run.mesh
  )
  logits = 4 * min(run.compute.loss_chunk or tokens, tokens) * model.vocab_size / run.mesh.tensor
  keeps = run.compute.remat == 'none' and run.mesh.fsdp * run.mesh.expert > 1
  layers = 3 + keeps * model.num_layers  # whose weights are whole at once
  peak = state + model.num_layers * (residual + saved) + layers * gathered + logits

  step_tokens = run.batch_size * job.sequence_length
  flops = arithmetic.training_flops(model, job.sequence_length) * step_tokens * again
  compute = flops / (topology.size * topology.chip.flops)
  passes = run.grad_accum_steps * model.num_layers
  wire = [
    _wire(network, run.mesh, 'fsdp', gathered, (2 if keeps else 3) * passes),
    _wire(network, run.mesh, 'expert', residual * run.mesh.expert, 5 * passes),
    _wire(network, run.mesh, 'tensor', 2 * residual, 4 * passes),
    _wire(network, run.mesh, 'data', 2 * state / 4, 1),
  ]
  # A little of what overlaps, so that of two layouts bound alike the one that sends less is first.
  seconds = max(compute, *wire) + 0.1 * (compute + sum(wire))
  return Guess(seconds / step_tokens, peak)


@functools.cache
def _state_bytes(
  model: config.Model, compute: config.Compute, optimizer: config.Optimizer, mesh: config.Mesh
) -> int:
  return accounting.state_bytes(model, compute, optimizer, mesh)['total']


def _saved(job: Job, tokens: int, itemsize: int) -> tuple[float, float]:
  """Bytes of a layer that the backward pass finds saved, and FLOPs over those without remat."""
  model, mesh = job.model, job.run.mesh
  group = mesh.expert if model.ffn_experts else 1
  heads = model.num_heads * 2 + model.num_kv_heads * 2
  experts = model.attention_experts.num_experts if model.attention_experts else 1
  attention = tokens * (heads * model.head_dim * experts / mesh.tensor + group * model.d_model)
  routed = model.ffn_experts.top_k if model.ffn_experts else 1
  hidden = 2 * tokens * min(group, ffn.ROOM) * routed * model.ffn_dim / mesh.tensor
  hidden += tokens * group * routed * model.d_model * bool(model.ffn_experts)
  forward = arithmetic.forward_parts(model, job.sequence_length)
  share = lambda *parts: 1 + sum(parts) / (3 * forward.total)
  match job.run.compute.remat:
    case 'full':
      return 0.0, share(forward.attention, forward.ffn)
    case 'attention':
      return itemsize * attention, share(forward.ffn)
    case 'matmuls':
      return itemsize * (attention + hidden), share()
  elementwise = 1 if mesh.fsdp * mesh.expert > 1 else 1.5
  return elementwise * itemsize * (attention + hidden), share()


def _wire(network: Network, mesh: config.Mesh, axis: str, size: float, times: int) -> float:
  """Seconds of gathers of arrays of `size` bytes along one axis."""
  count = getattr(mesh, axis)
  if count == 1:
    return 0.0
  ids = np.arange(math.prod(dataclasses.astuple(mesh))).reshape(dataclasses.astuple(mesh))
  group = np.moveaxis(ids, sharding.AXES.index(axis), -1).reshape(-1, count)[0]
  gather = Collective('all-gather', int(size / count), (tuple(group.tolist()),))
  return times * sum(network.seconds(gather))
