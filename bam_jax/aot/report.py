"""What a compiled step holds and costs, as facts for programs and tables for people."""

import collections
import dataclasses
from importlib import metadata
from typing import Any

import jax
import rich.table

from bam_jax import cli, config
from bam_jax.aot import cost, program, roofline
from bam_jax.aot.roofline import BOUNDS
from bam_jax.aot.topology import Topology
from bam_jax.generate import generator
from bam_jax.generate.decode import Decoder
from bam_jax.model import arithmetic

LIBRARIES = ('jax', 'jaxlib', 'libtpu')


def train_facts(
  job: program.Job, topology: Topology, mesh: jax.sharding.Mesh, compiled: program.Compiled
) -> dict[str, Any]:
  """The object that `python -m bam_jax.aot --help` describes, of a train step."""
  run = job.run
  facts = _common_facts(job, topology, compiled) | {
    'phase': 'train',
    'compute': config.to_dict(run.compute),
    'batch_size': run.batch_size,
    'grad_accum_steps': run.grad_accum_steps,
    'sequences_per_chip': job.sequences_per_chip,
    'sequence_length': job.sequence_length,
  }
  if not facts['fits']:
    return facts
  tokens = run.batch_size * job.sequence_length
  model_flops = arithmetic.training_flops(job.model, job.sequence_length) * tokens
  step = cost.read(compiled.executable.as_text(), topology.size, job.even_rows)
  facts |= _costs(topology, mesh, step, model_flops)
  speeds = {name: tokens / topology.size / facts['seconds'][name] for name in BOUNDS}
  return facts | {'tokens_per_second_per_chip': speeds}


def decode_facts(
  job: program.Job,
  decode: program.Decode,
  topology: Topology,
  mesh: jax.sharding.Mesh,
  decoder: Decoder,
  compiled: program.Compiled,
) -> dict[str, Any]:
  """The same of a decode step: of one token of each row, with every slot of the cache in use."""
  needed = program.needed_bytes(decoder, decode)
  facts = _common_facts(job, topology, compiled) | {
    'phase': 'decode',
    'dtype': decode.dtype,
    'batch_size': decode.batch_size,
    'context': decode.context,
    'slots': decode.slots,
    'needed_bytes': needed,
  }
  if not facts['fits']:
    return facts
  # The arithmetic counts half of the context, a sequence's average; this token sees all of it.
  model_flops = decode.batch_size * arithmetic.forward_flops(job.model, 2 * decode.slots)
  trips = {generator.DECODE_LOOP: generator.MAX_STEPS}
  call = cost.read(compiled.executable.as_text(), topology.size, trips=trips)
  facts |= _costs(topology, mesh, call.part(generator.MAX_STEPS), model_flops)
  speeds = {name: decode.batch_size / facts['seconds'][name] for name in BOUNDS}
  ratio = facts['hbm_bytes'] / sum(needed.values())
  return facts | {'hbm_ratio': ratio, 'tokens_per_second': speeds}


def _common_facts(
  job: program.Job, topology: Topology, compiled: program.Compiled
) -> dict[str, Any]:
  """What was compiled for what, and whether it fits."""
  peak, limit = compiled.peak_bytes, topology.chip.hbm_bytes
  facts = {
    'run': job.name,
    'label': job.run.label,
    'topology': topology.name,
    'slices': topology.slices,
    'chips': topology.size,
    'mesh': config.to_dict(job.run.mesh),
    'versions': {name: _version(name) for name in LIBRARIES},
    'compile_seconds': compiled.compile_seconds,
    'fits': compiled.executable is not None,
    'peak_bytes': peak,
    'hbm_limit_bytes': limit,
    'headroom_bytes': None if peak is None else limit - peak,
  }
  if not facts['fits']:
    return facts | {'reason': compiled.reason}
  return facts | {'memory': compiled.memory, 'lower_seconds': compiled.lower_seconds}


def _version(library: str) -> str | None:
  try:
    return metadata.version(library)
  except metadata.PackageNotFoundError:
    return None


def _costs(
  topology: Topology, mesh: jax.sharding.Mesh, step: cost.Program, model_flops: float
) -> dict[str, Any]:
  """What a step that fits does, and how long it takes; `step` is what one device does."""
  network, sizes = roofline.Network(topology, list(mesh.devices.flat)), dict(mesh.shape)
  flops = {kind: topology.size * number for kind, number in step.flops().items()}
  total, peak = sum(flops.values()), topology.size * topology.chip.flops
  seconds = roofline.seconds(step, network, sizes)
  collectives: dict[tuple[str, str], dict[str, Any]] = {}
  for event in [event for event in step.events if event.collective]:
    one, key = event.collective, (event.collective.kind, event.collective.axes(sizes))
    row = {'count': 1, 'asynchronous': int(event.asynchronous), 'operand_bytes': one.operand_bytes}
    row |= {'wire_bytes': one.wire_bytes, 'seconds': sum(network.seconds(one))}
    row = {name: event.times * value for name, value in row.items()}
    collectives.setdefault(key, collections.Counter()).update(row)
  rows = [{'kind': kind, 'axes': axes, **row} for (kind, axes), row in collectives.items()]
  return {
    'model_flops': model_flops,
    'compiled_flops': flops | {'total': total},
    'flops_ratio': total / model_flops,
    'uncounted_kernels': step.uncounted,
    'hbm_bytes': step.hbm_bytes(),
    'collectives': sorted(rows, key=lambda row: -row['wire_bytes']),
    'loops': [dataclasses.asdict(loop) for loop in step.loops],
    'seconds': seconds,
    'mfu': {name: model_flops / (peak * seconds[name]) for name in BOUNDS},
  }


def tables(facts: dict[str, Any]) -> list[rich.table.Table]:
  """The facts of either phase, under the names that they have in `--json`."""
  apart = ('collectives', 'loops', 'label', 'slices', 'versions', 'compute', 'fits')
  compute = {f'compute.{key}': facts.get('compute', {}).get(key) for key in ('dtype', 'remat')}
  rows = {key: value for key, value in (facts | compute).items() if key not in apart}
  loops = collections.Counter(
    '?' if loop['trips'] is None else loop['trips'] for loop in facts.get('loops', ())
  )
  rows['loops'] = ', '.join(f'{n} of {trips} trips' for trips, n in loops.items())
  rows = [(key, text(key, value)) for key, value in rows.items() if value not in (None, '', [])]
  slices = f'{facts["slices"]} x ' if facts['slices'] > 1 else ''
  fits = 'fits' if facts['fits'] else 'does not fit'
  summary = cli.table(f'{facts["run"]} {fits} {slices}{facts["topology"]}', ('', ''), (), rows)
  summary.show_header = False
  columns = ('count', 'asynchronous', 'wire_bytes', 'seconds')
  cells = [
    (row['kind'], row['axes'], *(text(name, row[name]) for name in columns))
    for row in facts.get('collectives', ())
  ]
  return [summary, *([cli.table(None, ('collective', 'axes'), columns, cells)] if cells else [])]


def text(key: str, value: Any) -> str:
  """A fact for a terminal, in the unit that its key tells."""
  if isinstance(value, dict):
    nested = lambda x: f'({text(key, x)})' if isinstance(x, dict) else text(key, x)
    return ', '.join(f'{name} {nested(x)}' for name, x in value.items())
  if not isinstance(value, int | float):
    return str(value)
  if 'bytes' in key or key == 'memory':
    return f'{value / 1e9:.2f} GB' if abs(value) >= 1e7 else f'{value / 1e6:.2f} MB'
  if key.endswith('_seconds'):
    return f'{value:.0f} s'
  if key == 'seconds':
    return f'{1e3 * value:.1f} ms' if value >= 0.01 else f'{1e3 * value:.3f} ms'
  if key.endswith('_flops'):
    return f'{value:.3e}'
  if key == 'mfu':
    return f'{value:.1%}'
  return f'{value:.3f}' if isinstance(value, float) and value < 100 else f'{value:,.0f}'


def mesh_text(mesh: dict[str, int]) -> str:
  """The axes of more than one device."""
  return ' '.join(f'{axis}={size}' for axis, size in mesh.items() if size > 1) or 'one device'
