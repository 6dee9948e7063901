"""What a compiled step holds and costs, as facts for programs and tables for people."""

import collections
import dataclasses
from importlib import metadata, util
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
  tokens = job.run.batch_size * job.sequence_length
  facts = _common_facts(job, topology, compiled) | {
    'phase': 'train',
    'compute': config.to_dict(job.run.compute),
    'batch_size': job.run.batch_size,
    'grad_accum_steps': job.run.grad_accum_steps,
    'sequences_per_chip': job.sequences_per_chip,
    'sequence_length': job.sequence_length,
  }
  if facts['fits']:
    step = cost.read(compiled.as_text(), topology.size, job.even_rows)
    model_flops = arithmetic.training_flops(job.model, job.sequence_length) * tokens
    facts |= _costs(topology, mesh, step, model_flops)
    speeds = {name: tokens / topology.size / facts['seconds'][name] for name in BOUNDS}
    facts['tokens_per_second_per_chip'] = speeds
  return facts


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
  facts = _common_facts(job, topology, compiled) | {'phase': 'decode', 'needed_bytes': needed}
  facts |= dataclasses.asdict(decode) | {'slots': decode.slots}
  if facts['fits']:
    trips = {generator.DECODE_LOOP: generator.MAX_STEPS}
    call = cost.read(compiled.as_text(), topology.size, trips=trips)
    # The arithmetic counts half of the context, a sequence's average; this token sees all of it.
    model_flops = decode.batch_size * arithmetic.forward_flops(job.model, 2 * decode.slots)
    facts |= _costs(topology, mesh, call.part(generator.MAX_STEPS), model_flops)
    facts['hbm_ratio'] = facts['hbm_bytes'] / sum(needed.values())
    speeds = {name: decode.batch_size / facts['seconds'][name] for name in BOUNDS}
    facts['tokens_per_second'] = speeds
  return facts


def _common_facts(
  job: program.Job, topology: Topology, compiled: program.Compiled
) -> dict[str, Any]:
  """What was compiled for what, and whether it fits."""
  limit = topology.chip.hbm_bytes
  facts = {
    'run': job.name,
    'label': job.run.label,
    'topology': topology.name,
    'slices': topology.slices,
    'chips': topology.size,
    'mesh': config.to_dict(job.run.mesh),
    'versions': {name: metadata.version(name) for name in LIBRARIES if util.find_spec(name)},
    'hbm_limit_bytes': limit,
    'fits': not isinstance(compiled, str),
  }
  if not facts['fits']:
    return facts | {'reason': compiled, 'peak_bytes': None, 'headroom_bytes': None}
  stats = compiled.memory_analysis()
  memory = {
    'arguments': stats.argument_size_in_bytes,
    'temporaries': stats.temp_size_in_bytes,
    'outputs': stats.output_size_in_bytes,
    'aliased': stats.alias_size_in_bytes,
  }
  peak = sum(memory.values()) - 2 * memory['aliased']
  return facts | {'memory': memory, 'peak_bytes': peak, 'headroom_bytes': limit - peak}


def _costs(
  topology: Topology, mesh: jax.sharding.Mesh, step: cost.Program, model_flops: float
) -> dict[str, Any]:
  """What a step that fits does, and how long it takes; `step` is what one device does."""
  network, sizes = roofline.Network(topology, list(mesh.devices.flat)), dict(mesh.shape)
  flops = {kind: topology.size * number for kind, number in step.flops().items()}
  total, peak = sum(flops.values()), topology.size * topology.chip.flops
  seconds = roofline.seconds(step, network, sizes)
  rows: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
  for event in step.events:
    if one := event.collective:
      row = rows[one.kind, one.axes(sizes)]
      row['count'] += event.times
      row['asynchronous'] += event.times * event.asynchronous
      row['operand_bytes'] += event.times * one.operand_bytes
      row['wire_bytes'] += event.times * one.wire_bytes
      row['seconds'] += event.times * sum(network.seconds(one))
  collectives = [{'kind': kind, 'axes': axes, **row} for (kind, axes), row in rows.items()]
  return {
    'model_flops': model_flops,
    'compiled_flops': flops | {'total': total},
    'flops_ratio': total / model_flops,
    'uncounted_kernels': step.uncounted,
    'hbm_bytes': step.hbm_bytes(),
    'collectives': sorted(collectives, key=lambda row: -row['wire_bytes']),
    'seconds': seconds,
    'mfu': {name: model_flops / (peak * seconds[name]) for name in BOUNDS},
  }


def tables(facts: dict[str, Any]) -> list[rich.table.Table]:
  """The facts of either phase, under the names that they have in `--json`."""
  apart = 'collectives label slices versions fits candidates flags'.split()
  known = {key: value for key, value in facts.items() if value not in (None, '', [])}
  rows = [(key, text(key, value)) for key, value in known.items() if key not in apart]
  slices = f'{facts["slices"]} x ' if facts['slices'] > 1 else ''
  fits = 'fits' if facts['fits'] else 'does not fit'
  summary = cli.table(f'{facts["run"]} {fits} {slices}{facts["topology"]}', ('', ''), (), rows)
  summary.show_header = False
  columns = ('count', 'asynchronous', 'wire_bytes', 'seconds')
  cells = lambda row: (row['kind'], row['axes'], *(text(name, row[name]) for name in columns))
  sent = [cells(row) for row in facts.get('collectives', ())]
  return [summary, *([cli.table(None, ('collective', 'axes'), columns, sent)] if sent else [])]


def text(key: str, value: Any) -> str:
  """A fact for a terminal, in the unit that its key tells."""
  if isinstance(value, dict):
    nested = lambda x: f'({text(key, x)})' if isinstance(x, dict) else text(key, x)
    return ', '.join(f'{name} {nested(x)}' for name, x in value.items())
  if not isinstance(value, int | float):
    return str(value)
  if 'bytes' in key or key == 'memory':
    return f'{value / 1e9:.2f} GB' if abs(value) >= 1e7 else f'{value / 1e6:.2f} MB'
  if key == 'seconds':
    return f'{1e3 * value:.1f} ms' if value >= 0.01 else f'{1e3 * value:.3f} ms'
  for ending, form in (('_flops', '{:.3e}'), ('mfu', '{:.1%}')):
    if key.endswith(ending):
      return form.format(value)
  return f'{value:.3f}' if isinstance(value, float) and value < 100 else f'{value:,.0f}'
