"""What a compiled step holds and costs, as facts for programs and tables for people."""

import dataclasses
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
import rich.table

from bam_jax import config
from bam_jax.compiled import collectives, cost, network, program, roofline
from bam_jax.compiled.topology import Topology
from bam_jax.model import arithmetic

LIBRARIES = ('jax', 'jaxlib', 'libtpu')
BOUNDS = ('roofline', 'in_order', 'no_overlap')


def facts(
  job: program.Job,
  topology: Topology,
  mesh: jax.sharding.Mesh,
  compiled: program.Compiled | program.TooLarge,
) -> dict[str, Any]:
  """The object that `python -m bam_jax.aot --help` describes."""
  result = _what(job, topology) | {'compile_seconds': compiled.compile_seconds}
  if isinstance(compiled, program.TooLarge):
    needed = compiled.needed_bytes
    return result | {
      'fits': False,
      'reason': compiled.reason,
      'peak_bytes': needed,
      'headroom_bytes': None if needed is None else topology.chip.hbm_bytes - needed,
    }
  read = cost.read(compiled.executable.as_text(), topology.size, job.even_share)
  links = network.Network(topology, list(mesh.devices.flat))
  return (
    result
    | {'fits': True, 'lower_seconds': compiled.lower_seconds}
    | _memory(compiled.memory, topology)
    | _flops(job, topology, read)
    | {'hbm_bytes': read.hbm_bytes()}
    | {'collectives': _collectives(read, links, dict(mesh.shape))}
    | {'loops': [dataclasses.asdict(loop) for loop in read.loops]}
    | _times(job, topology, roofline.seconds(read, links, dict(mesh.shape)))
  )


def _what(job: program.Job, topology: Topology) -> dict[str, Any]:
  run = job.run
  return {
    'run': job.name,
    'label': run.label,
    'topology': topology.name,
    'slices': topology.slices,
    'chips': topology.size,
    'mesh': config.to_dict(run.mesh),
    'compute': config.to_dict(run.compute),
    'batch_size': run.batch_size,
    'accumulate': run.accumulate,
    'sequences_per_chip': job.sequences_per_chip,
    'sequence_length': job.sequence_length,
    'hbm_limit_bytes': topology.chip.hbm_bytes,
    'versions': {library: _version(library) for library in LIBRARIES},
  }


def _version(library: str) -> str | None:
  try:
    return metadata.version(library)
  except metadata.PackageNotFoundError:
    return None  # the topology may not need it


def _memory(memory: program.Memory, topology: Topology) -> dict[str, Any]:
  return {
    'memory': dataclasses.asdict(memory),
    'peak_bytes': memory.peak,
    'headroom_bytes': topology.chip.hbm_bytes - memory.peak,
  }


def _flops(job: program.Job, topology: Topology, read: cost.Program) -> dict[str, Any]:
  tokens = job.run.batch_size * job.sequence_length
  model = arithmetic.training_flops(job.model, job.sequence_length) * tokens
  compiled = {kind: topology.size * number for kind, number in read.flops().items()}
  total = sum(compiled.values())
  return {
    'model_flops': model,
    'compiled_flops': compiled | {'total': total},
    'flops_ratio': total / model,
    'uncounted_kernels': list(read.uncounted),
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


def _times(job: program.Job, topology: Topology, seconds: roofline.Seconds) -> dict[str, Any]:
  tokens = job.run.batch_size * job.sequence_length
  model = arithmetic.training_flops(job.model, job.sequence_length) * tokens
  bounds = {name: getattr(seconds, name) for name in BOUNDS}
  peak = topology.size * topology.chip.flops
  return {
    'seconds': {
      'compute': seconds.compute,
      'hbm': seconds.hbm,
      'wire': seconds.wire,
      'between_slices': seconds.between_slices,
      **bounds,
    },
    'mfu': {name: model / (peak * bound) for name, bound in bounds.items()},
    'tokens_per_second_per_chip': {
      name: tokens / topology.size / bound for name, bound in bounds.items()
    },
  }


def tables(facts: dict[str, Any]) -> list[rich.table.Table]:
  """What `facts` returns, for a terminal."""
  if not facts['fits']:
    return [_summary(facts, [('why', facts['reason'])])]
  memory = facts['memory']
  seconds, mfu, speed = facts['seconds'], facts['mfu'], facts['tokens_per_second_per_chip']
  wire = [(f'  over {axes}', _ms(time)) for axes, time in seconds['wire'].items()]
  between = [('  between slices', _ms(seconds['between_slices']))] if facts['slices'] > 1 else []
  rows = [
    ('arguments, temporaries', f'{_gb(memory["arguments"])}, {_gb(memory["temporaries"])}'),
    ('compiled / model FLOPs', f'{facts["flops_ratio"]:.3f}'),
    *((f'  {kind}', f'{n:.3e}') for kind, n in facts['compiled_flops'].items()),
    ('  of the model', f'{facts["model_flops"]:.3e}'),
    ('HBM traffic a chip', _gb(facts['hbm_bytes'])),
    ('loops', ', '.join(f'{loop["trips"]}' for loop in facts['loops']) or 'none'),
    ('compute', _ms(seconds['compute'])),
    ('HBM', _ms(seconds['hbm'])),
    *wire,
    *between,
    *(
      (name.replace('_', ' '), f'{_ms(seconds[name])}, MFU {mfu[name]:.1%}, {speed[name]:,.0f} '
       'tokens/s a chip') for name in BOUNDS
    ),
    ('compilation', f'{facts["compile_seconds"]:.0f} s'),
  ]  # fmt: skip
  return [_summary(facts, rows), _collective_table(facts['collectives'])]


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
  table = _table(f'{facts["run"]} on {slices}{facts["topology"]}, one step', ('', ''))
  table.columns[1].overflow = 'fold'
  compute, headroom = facts['compute'], facts['headroom_bytes']
  table.add_row('mesh', mesh_text(facts['mesh']))
  table.add_row(
    'batch',
    f'{facts["batch_size"]} x {facts["sequence_length"]}, {facts["sequences_per_chip"]} sequences '
    f'a chip at once, {facts["accumulate"]} times',
  )
  table.add_row('compute', f'{compute["dtype"]}, remat {compute["remat"]}')
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
  return f'{number / 1e9:.2f} GB'


def _ms(seconds: float) -> str:
  return f'{1e3 * seconds:.1f} ms'
