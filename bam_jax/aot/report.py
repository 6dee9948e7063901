"""What a compiled step holds and costs, as facts for programs and tables for people."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
import rich.table

from bam_jax import config
from bam_jax.aot import collectives, cost, network, program, roofline
from bam_jax.aot.topology import Topology
from bam_jax.model import arithmetic

LIBRARIES = ('jax', 'jaxlib', 'libtpu')
BOUNDS = ('roofline', 'in_order', 'no_overlap')


def facts(
  job: program.Job,
  topology: Topology,
  mesh: jax.sharding.Mesh,
  compiled: program.Compiled | program.TooLarge,
) -> dict[str, Any]:
  """The object that `python -m bam_jax.aot --help` describes, of a train step."""
  run = job.run
  result = what(job, topology, compiled) | {
    'phase': 'train',
    'compute': config.to_dict(run.compute),
    'batch_size': run.batch_size,
    'grad_accum_steps': run.grad_accum_steps,
    'sequences_per_chip': job.sequences_per_chip,
    'sequence_length': job.sequence_length,
  }
  if isinstance(compiled, program.TooLarge):
    return result
  tokens = run.batch_size * job.sequence_length
  model_flops = arithmetic.training_flops(job.model, job.sequence_length) * tokens
  read = cost.read(compiled.executable.as_text(), topology.size, job.even_rows)
  result |= costs(topology, mesh, read, model_flops)
  speeds = {name: tokens / topology.size / result['seconds'][name] for name in BOUNDS}
  return result | {'tokens_per_second_per_chip': speeds}


def what(
  job: program.Job, topology: Topology, compiled: program.Compiled | program.TooLarge
) -> dict[str, Any]:
  """What was compiled for what, and whether it fits."""
  result = {
    'run': job.name,
    'label': job.run.label,
    'topology': topology.name,
    'slices': topology.slices,
    'chips': topology.size,
    'mesh': config.to_dict(job.run.mesh),
    'hbm_limit_bytes': topology.chip.hbm_bytes,
    'versions': {library: _version(library) for library in LIBRARIES},
    'compile_seconds': compiled.compile_seconds,
  }
  if isinstance(compiled, program.TooLarge):
    peak, reason = compiled.needed_bytes, compiled.reason
    result |= {'fits': False, 'reason': reason, 'peak_bytes': peak}
  else:
    peak, memory = compiled.memory.peak, dataclasses.asdict(compiled.memory)
    result |= {'fits': True, 'lower_seconds': compiled.lower_seconds}
    result |= {'memory': memory, 'peak_bytes': peak}
  return result | {'headroom_bytes': None if peak is None else topology.chip.hbm_bytes - peak}


def _version(library: str) -> str | None:
  try:
    return metadata.version(library)
  except metadata.PackageNotFoundError:
    return None  # the topology may not need it


def costs(
  topology: Topology, mesh: jax.sharding.Mesh, read: cost.Program, model_flops: float
) -> dict[str, Any]:
  """What a step that fits does, and how long it takes.

  Args:
    topology: of the mesh's devices.
    mesh: that it was compiled for.
    read: what one device does in a step.
    model_flops: that all of them need for a step.
  """
  links, sizes = network.Network(topology, list(mesh.devices.flat)), dict(mesh.shape)
  compiled = {kind: topology.size * number for kind, number in read.flops().items()}
  total, peak = sum(compiled.values()), topology.size * topology.chip.flops
  seconds = roofline.seconds(read, links, sizes)
  bounds = {name: getattr(seconds, name) for name in BOUNDS}
  return {
    'model_flops': model_flops,
    'compiled_flops': compiled | {'total': total},
    'flops_ratio': total / model_flops,
    'uncounted_kernels': list(read.uncounted),
    'hbm_bytes': read.hbm_bytes(),
    'collectives': _collectives(read, links, sizes),
    'loops': [dataclasses.asdict(loop) for loop in read.loops],
    'seconds': {
      'compute': seconds.compute,
      'hbm': seconds.hbm,
      'wire': seconds.wire,
      'between_slices': seconds.between_slices,
      **bounds,
    },
    'mfu': {name: model_flops / (peak * bound) for name, bound in bounds.items()},
  }


def _collectives(
  read: cost.Program, links: network.Network, sizes: dict[str, int]
) -> list[dict[str, Any]]:
  rows: dict[tuple[str, str], dict[str, Any]] = {}
  for event in read.collectives():
    one = event.collective
    key = one.kind, roofline.label(collectives.axes(one, sizes))
    row = rows.setdefault(
      key,
      dict(kind=key[0], axes=key[1], count=0, asynchronous=0, operand_bytes=0, wire_bytes=0.0,
           seconds=0.0),
    )  # fmt: skip
    row['count'] += event.times
    row['asynchronous'] += event.times * event.asynchronous
    row['operand_bytes'] += event.times * one.operand_bytes
    row['wire_bytes'] += event.times * one.wire_bytes
    row['seconds'] += event.times * sum(links.seconds(one))
  return sorted(rows.values(), key=lambda row: -row['wire_bytes'])


def tables(facts: dict[str, Any]) -> list[rich.table.Table]:
  """The facts of either phase, for a terminal."""
  if not facts['fits']:
    return [_summary(facts, [('why', facts['reason'])])]
  memory, seconds = facts['memory'], facts['seconds']
  wire = [(f'  over {axes}', _ms(time)) for axes, time in seconds['wire'].items()]
  between = [('  between slices', _ms(seconds['between_slices']))] if facts['slices'] > 1 else []
  trips = ('?' if loop['trips'] is None else loop['trips'] for loop in facts['loops'])
  speed = _train_speed if facts['phase'] == 'train' else _decode_speed
  rows = [
    ('arguments, temporaries', f'{_gb(memory["arguments"])}, {_gb(memory["temporaries"])}'),
    ('compiled / model FLOPs', f'{facts["flops_ratio"]:.3f}'),
    *((f'  {kind}', f'{n:.3e}') for kind, n in facts['compiled_flops'].items()),
    ('  of the model', f'{facts["model_flops"]:.3e}'),
    ('HBM traffic a chip', _gb(facts['hbm_bytes'])),
    *((f'  {kind} to read', _gb(n)) for kind, n in facts.get('needed_bytes', {}).items()),
    ('loops', ', '.join(f'{n} of {number}' for number, n in Counter(trips).items()) or 'none'),
    ('compute', _ms(seconds['compute'])),
    ('HBM', _ms(seconds['hbm'])),
    *wire,
    *between,
    *((name.replace('_', ' '), f'{_ms(seconds[name])}, {speed(facts, name)}') for name in BOUNDS),
    ('compilation', f'{facts["compile_seconds"]:.0f} s'),
  ]
  return [_summary(facts, rows), _collective_table(facts['collectives'])]


def _train_speed(facts: dict[str, Any], bound: str) -> str:
  speed = facts['tokens_per_second_per_chip'][bound]
  return f'MFU {facts["mfu"][bound]:.1%}, {speed:,.0f} tokens/s a chip'


def _decode_speed(facts: dict[str, Any], bound: str) -> str:
  return f'{facts["tokens_per_second"][bound]:,.0f} tokens/s'


def notes(facts: dict[str, Any]) -> list[str]:
  """What must be known to read the numbers."""
  result = []
  if names := facts.get('uncounted_kernels'):
    result.append(f'FLOPs of kernels that say nothing of them are left out: {", ".join(names)}.')
  if any(loop['trips'] is None for loop in facts.get('loops', ())):
    result.append('The trips of a loop are not known: its body is counted once.')
  return result


def _summary(facts: dict[str, Any], rows: Sequence[tuple[str, str]]) -> rich.table.Table:
  slices = f'{facts["slices"]} x ' if facts['slices'] > 1 else ''
  step = {'train': 'one step', 'decode': 'one token of each row'}[facts['phase']]
  table = _table(f'{facts["run"]} on {slices}{facts["topology"]}, {step}', ('', ''))
  table.columns[1].overflow = 'fold'
  headroom = facts['headroom_bytes']
  table.add_row('mesh', mesh_text(facts['mesh']))
  for row in _train_head(facts) if facts['phase'] == 'train' else _decode_head(facts):
    table.add_row(*row)
  if headroom is None:
    table.add_row('fits', 'no')
  else:
    table.add_row(
      'fits' if facts['fits'] else 'does not fit',
      f'{_gb(facts["peak_bytes"])} of {_gb(facts["hbm_limit_bytes"])}, '
      f'{_gb(abs(headroom))} {"left" if headroom >= 0 else "too much"}',
    )
  for row in rows:
    table.add_row(*row)
  return table


def _train_head(facts: dict[str, Any]) -> list[tuple[str, str]]:
  compute = facts['compute']
  batch = (
    f'{facts["batch_size"]} x {facts["sequence_length"]}, {facts["sequences_per_chip"]} sequences '
    f'a chip at once, {facts["grad_accum_steps"]} times'
  )
  return [('batch', batch), ('compute', f'{compute["dtype"]}, remat {compute["remat"]}')]


def _decode_head(facts: dict[str, Any]) -> list[tuple[str, str]]:
  batch = f'{facts["batch_size"]} rows, room for {facts["slots"]} tokens each'
  return [('batch', batch), ('dtype', facts['dtype'])]


def _collective_table(rows: Sequence[dict[str, Any]]) -> rich.table.Table:
  columns = ('collective', 'axes', 'count', 'asynchronous', 'wire a chip', 'time')
  table = _table('Collectives, a step', columns)
  for row in rows:
    table.add_row(
      row['kind'], row['axes'], f'{row["count"]:,}', f'{row["asynchronous"]:,}',
      _gb(row['wire_bytes']), _ms(row['seconds']),
    )  # fmt: skip
  return table


def mesh_text(mesh: dict[str, int]) -> str:
  """The axes of more than one device."""
  return ' '.join(f'{axis}={size}' for axis, size in mesh.items() if size > 1) or 'one device'


def _table(title: str, columns: Sequence[str]) -> rich.table.Table:
  table = rich.table.Table(title=title, title_justify='left', box=None, pad_edge=False)
  for number, column in enumerate(columns):
    table.add_column(column, justify='right' if len(columns) > 2 and number > 1 else 'left')
  table.show_header = any(columns)
  return table


def _gb(number: float) -> str:
  return f'{number / 1e9:.2f} GB' if number >= 1e7 else f'{number / 1e6:.2f} MB'


def _ms(seconds: float) -> str:
  return f'{1e3 * seconds:.1f} ms' if seconds >= 0.01 else f'{1e3 * seconds:.3f} ms'
