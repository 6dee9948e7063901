"""Searches mesh, remat and sequences a chip: guesses what each layout costs, compiles the best.

The guess only orders the layouts and drops the hopeless ones: what is reported is compiled.
"""

import contextlib
import dataclasses
import functools
import itertools
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from bam_jax import cli, config
from bam_jax.account import accounting
from bam_jax.aot import program, report
from bam_jax.aot.program import Job
from bam_jax.aot.roofline import BOUNDS
from bam_jax.aot.topology import Chip, Topology
from bam_jax.config.strict import require
from bam_jax.errors import UserError
from bam_jax.model import arithmetic, transformer
from bam_jax.parallel import sharding

REMAT = typing.get_args(typing.get_type_hints(config.Compute)['remat'])[1:]  # 'none' first
SLACK = 1.1  # layouts that are guessed to need this times the memory are not compiled
KEYS = (  # of a candidate
  'mesh', 'compute', 'grad_accum_steps', 'sequences_per_chip', 'fits', 'peak_bytes', 'seconds',
  'mfu',
)  # fmt: skip
TRIED = 8  # layouts at most that are compiled, in half a minute to three minutes each

_state_bytes = functools.cache(accounting.state_bytes)


def search(
  job: Job, topology: Topology, devices: Sequence[Any], sequences_per_chip: int | None
) -> dict[str, Any]:
  """The facts of the layout with the least roofline time a token of those compiled.

  They have `candidates` and `flags`. UserError when no layout is legal, or no compiled one fits.
  """
  chip, console = topology.chip, cli.console()
  possible = [(*guess(x, chip), x) for x in layouts(job, topology, sequences_per_chip)]
  wrong = f'No mesh of {topology.size} chips divides the model and batch_size={job.run.batch_size}'
  fix = 'change --topology, or set --sequences_per_chip.'
  require(possible, f'{wrong} of {job.key}: {fix}')
  hopeful = [x for x in possible if x[1] <= SLACK * chip.hbm_bytes] or possible
  tried, done = sorted(hopeful, key=lambda x: x[0])[:TRIED], []
  for number, (*_, layout) in enumerate(tried, 1):
    mesh = program.make_mesh(layout, devices, topology)
    facts = report.train_facts(layout, topology, mesh, program.compile_train(layout, mesh))
    speed, outcome = [0.0], 'does not fit'
    if facts['fits']:
      speed = [facts['tokens_per_second_per_chip'][name] for name in BOUNDS[:2]]
      values = facts['peak_bytes'], facts['seconds']['roofline'], facts['mfu']['roofline']
      peak, time, mfu = map(report.text, ('peak_bytes', 'seconds', 'mfu'), values)
      outcome = f'{peak}, at least {time}, MFU {mfu}'
    sizes, remat = accounting.mesh_text(facts['mesh']), layout.run.compute.remat
    what = f'remat {remat}, {facts["sequences_per_chip"]} sequences a chip'
    console.print(f'{number} of {len(tried)}: {sizes}, {what}: {outcome}', soft_wrap=True)
    done.append((speed, layout, facts))
  done.sort(key=lambda x: x[0], reverse=True)
  _, best, facts = done[0]
  wrong = f'None of the {len(done)} compiled layouts of {len(hopeful)} fits {topology.name}'
  require(facts['fits'], f'{wrong}: use more chips, or fewer --sequences_per_chip.')
  keys = lambda job: traverse_util.flatten_dict(config.to_dict(job.run), sep='.')
  before, after = keys(job), keys(best)
  flags = [f'--{job.key}.{key}={new}' for key, new in after.items() if new != before[key]]
  console.print('The best of them:', *flags, sep='\n  ', end='\n\n')
  rows = [{key: found[key] for key in KEYS if key in found} for *_, found in done]
  return facts | {'candidates': rows, 'flags': flags}


def layouts(job: Job, topology: Topology, sequences_per_chip: int | None) -> Iterator[Job]:
  """The job under every mesh, remat and number of sequences at once that is legal.

  Only replicas lie in different slices. A batch keeps its size, by accumulation, unless
  `sequences_per_chip` says how many sequences a chip has in a step.
  """
  for mesh in meshes(job.model, topology):
    here, (of_chip, rest) = job.replace(mesh=mesh), divmod(job.run.batch_size, mesh.batch_shards)
    if sequences_per_chip:
      batches = [here.with_sequences(sequences_per_chip)]
    else:
      at_once = [] if rest else [2**power for power in range(of_chip.bit_length())]
      steps = [of_chip // n for n in at_once if of_chip % n == 0]
      batches = [here.replace(grad_accum_steps=number) for number in steps]
    for layout, remat in itertools.product(batches, REMAT):
      yield layout.replace(compute=dataclasses.replace(job.run.compute, remat=remat))


def meshes(model: config.Model, topology: Topology) -> list[config.Mesh]:
  """The meshes of all chips that divide every array of the model."""
  abstract = transformer.Network(model, config.Compute()).abstract()
  experts = model.ffn_experts.num_experts if model.ffn_experts else 1
  found = []
  sizes = [size for size in range(1, topology.size + 1) if topology.size % size == 0]
  for data, expert, tensor in itertools.product(sizes, repeat=3):
    fsdp, rest = divmod(topology.size, data * expert * tensor)
    if rest or data % topology.slices or experts % expert:
      continue
    mesh = config.Mesh(data, fsdp, expert, tensor)
    with contextlib.suppress(UserError):
      sharding.check(abstract, mesh, 'config')
      found.append(mesh)
  return found


def guess(job: Job, chip: Chip) -> tuple[float, float]:
  """Seconds a token and bytes of memory of a layout, from the sizes of its arrays."""
  model, run, mesh = job.model, job.run, job.run.mesh
  attention, ffn, L = model.attention_experts, model.ffn_experts, model.num_layers
  compute = dataclasses.replace(run.compute, remat='full')
  weights = accounting.gathered_bytes(model, compute, mesh)  # of a layer
  tokens = job.sequences_per_chip * job.sequence_length
  channel = jnp.dtype(run.compute.dtype).itemsize * tokens
  residual = channel * model.d_model

  # What a layer saves for the backward pass, and the FLOPs of what is computed again.
  gathered = residual * (mesh.expert if ffn else 1)
  heads = 2 * (model.num_heads + model.num_kv_heads) * (attention.num_experts if attention else 1)
  attended = gathered + channel * heads * model.head_dim / mesh.tensor
  room = min(mesh.expert, 2) * ffn.top_k if ffn else 1  # twice an even load
  hidden = channel * room * len(model.ffn_inputs) * model.ffn_dim / mesh.tensor
  hidden += gathered * ffn.top_k if ffn else 0
  forward = arithmetic.forward_parts(model, job.sequence_length)
  saved, again = {
    'none': (attended + hidden, 0),
    'matmuls': (attended + hidden, 0),
    'attention': (attended, forward.ffn),
    'full': (0, forward.attention + forward.ffn),
  }[run.compute.remat]

  keeps = run.compute.remat == 'none'  # gathered weights for the backward pass
  state = _state_bytes(model, compute, run.optimizer, mesh)['total']
  logits = 4 * min(run.compute.loss_chunk or tokens, tokens) * model.vocab_size / mesh.tensor
  peak = state + L * (residual + saved) + (3 + keeps * L) * weights + logits

  passes = run.grad_accum_steps * L
  gathers = {
    'fsdp': (2 if keeps else 3) * passes * weights,
    'expert': 5 * passes * residual * mesh.expert,
    'tensor': 8 * passes * residual,
    'data': state / 2,
  }
  share = {axis: (1 - 1 / getattr(mesh, axis)) / chip.link_bandwidth for axis in gathers}
  wire = [size * share[axis] for axis, size in gathers.items()]
  step_tokens = run.batch_size * job.sequence_length
  flops = (arithmetic.training_flops(model, job.sequence_length) + again) * step_tokens
  seconds = flops / (mesh.size * chip.flops)
  # A little of what overlaps, so that of two layouts bound alike the one that sends less is first.
  return (max(seconds, *wire) + 0.1 * (seconds + sum(wire))) / step_tokens, peak
