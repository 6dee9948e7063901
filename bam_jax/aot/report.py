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
from bam_jax.model import arithmetic
from bam_jax.model.decoder import Decoder

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
    'versions': {library: _version(library) for library in LIBRARIES},
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
    return None  # libtpu, which tests do without


def _costs(
  topology: Topology, mesh: jax.sharding.Mesh, step: cost.Program, model_flops: float
) -> dict[str, Any]:
  """What a step that fits does, and how long it takes.

  Args:
    topology: of the mesh's devices.
    mesh: that it was compiled for.
    step: what one device does.
    model_flops: that all devices need for it.
  """
  network, sizes = roofline.Network(topology, list(mesh.devices.flat)), dict(mesh.shape)
  flops = {kind: topology.size * number for kind, number in step.flops().items()}
  total, peak = sum(flops.values()), topology.size * topology.chip.flops
  seconds = roofline.seconds(step, network, sizes)
  collectives: dict[tuple[str, str], dict[str, Any]] = {}
  for event in [event for event in step.events if event.collective]:
    one, key = event.collective, (event.collective.kind, event.collective.axes(sizes))
    row = collectives.setdefault(key, collections.Counter())
    row['count'] += event.times
    row['asynchronous'] += event.times * event.asynchronous
    row['operand_bytes'] += event.times * one.operand_bytes
    row['wire_bytes'] += event.times * one.wire_bytes
    row['seconds'] += event.times * sum(network.seconds(one))
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
  """The facts of either phase, for a terminal."""
  train = facts['phase'] == 'train'
  rows = [('mesh', mesh_text(facts['mesh']))]
  if train:
    at_once, times = facts['sequences_per_chip'], facts['grad_accum_steps']
    batch = (
      f'{facts["batch_size"]} x {facts["sequence_length"]}, {at_once} sequences a chip at once'
    )
    compute = f'{facts["compute"]["dtype"]}, remat {facts["compute"]["remat"]}'
    rows += [('batch', f'{batch}, {times} times'), ('compute', compute)]
  else:
    batch = f'{facts["batch_size"]} rows, room for {facts["slots"]} tokens each'
    rows += [('batch', batch), ('dtype', facts['dtype'])]
  if (headroom := facts['headroom_bytes']) is None:
    rows.append(('fits', 'no'))
  else:
    room = f'{_gb(abs(headroom))} {"left" if headroom >= 0 else "too much"}'
    room = f'{_gb(facts["peak_bytes"])} of {_gb(facts["hbm_limit_bytes"])}, {room}'
    rows.append(('fits' if facts['fits'] else 'does not fit', room))
  rows += _cost_rows(facts) if facts['fits'] else [('why', facts['reason'])]
  slices = f'{facts["slices"]} x ' if facts['slices'] > 1 else ''
  what = 'one step' if train else 'one token of each row'
  title = f'{facts["run"]} on {slices}{facts["topology"]}, {what}'
  summary = cli.table(title, ('', ''), (), rows)
  summary.show_header = False
  if not facts['fits']:
    return [summary]
  columns = ('count', 'asynchronous', 'wire a chip', 'time')
  cells = [
    (row['kind'], row['axes'], row['count'], row['asynchronous'], _gb(row['wire_bytes']),
     _ms(row['seconds']))
    for row in facts['collectives']
  ]  # fmt: skip
  return [summary, cli.table('Collectives, a step', ('collective', 'axes'), columns, cells)]


def _cost_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
  memory, seconds = facts['memory'], facts['seconds']
  trips = ('?' if loop['trips'] is None else loop['trips'] for loop in facts['loops'])
  loops = ', '.join(f'{n} of {number}' for number, n in collections.Counter(trips).items())
  rows = [
    ('arguments, temporaries', f'{_gb(memory["arguments"])}, {_gb(memory["temporaries"])}'),
    ('compiled / model FLOPs', f'{facts["flops_ratio"]:.3f}'),
    *((f'  {kind}', f'{n:.3e}') for kind, n in facts['compiled_flops'].items()),
    ('  of the model', f'{facts["model_flops"]:.3e}'),
    ('HBM traffic a chip', _gb(facts['hbm_bytes'])),
    *((f'  {kind} to read', _gb(n)) for kind, n in facts.get('needed_bytes', {}).items()),
    ('loops', loops or 'none'),
    ('compute', _ms(seconds['compute'])),
    ('HBM', _ms(seconds['hbm'])),
    *((f'  over {axes}', _ms(time)) for axes, time in seconds['wire'].items()),
  ]
  if facts['slices'] > 1:
    rows.append(('  between slices', _ms(seconds['between_slices'])))
  for name in BOUNDS:
    if facts['phase'] == 'train':
      speed = f'{facts["tokens_per_second_per_chip"][name]:,.0f} tokens/s a chip'
      speed = f'MFU {facts["mfu"][name]:.1%}, {speed}'
    else:
      speed = f'{facts["tokens_per_second"][name]:,.0f} tokens/s'
    rows.append((name.replace('_', ' '), f'{_ms(seconds[name])}, {speed}'))
  return [*rows, ('compilation', f'{facts["compile_seconds"]:.0f} s')]


def notes(facts: dict[str, Any]) -> list[str]:
  """Sentences about what the numbers leave out."""
  result = []
  if names := facts.get('uncounted_kernels'):
    result.append(f'FLOPs of kernels that give no estimate are left out: {", ".join(names)}.')
  if any(loop['trips'] is None for loop in facts.get('loops', ())):
    result.append('The number of trips of a loop is not known: its body is counted once.')
  return result


def mesh_text(mesh: dict[str, int]) -> str:
  """The axes of more than one device."""
  return ' '.join(f'{axis}={size}' for axis, size in mesh.items() if size > 1) or 'one device'


def _gb(number: float) -> str:
  return f'{number / 1e9:.2f} GB' if number >= 1e7 else f'{number / 1e6:.2f} MB'


def _ms(seconds: float) -> str:
  return f'{1e3 * seconds:.1f} ms' if seconds >= 0.01 else f'{1e3 * seconds:.3f} ms'
