"""Compiles one layout of a run, or the most promising ones of all that a topology allows."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import rich.console
import rich.progress
import rich.table

from bam_jax.aot import candidates, program, report
from bam_jax.aot.network import Network
from bam_jax.aot.topology import Topology
from bam_jax.errors import UserError


@dataclass(frozen=True)
class Found:
  """A compiled layout."""

  job: program.Job
  compiled: program.Compiled | program.TooLarge
  facts: dict[str, Any]

  @property
  def seconds_per_token(self) -> tuple[float, float]:
    """What the best layout has least of; infinite for one that does not fit."""
    if not self.facts['fits']:
      return float('inf'), float('inf')
    tokens = self.facts['batch_size'] * self.facts['sequence_length']
    seconds = self.facts['seconds']
    return seconds['roofline'] / tokens, seconds['in_order'] / tokens


def one(job: program.Job, topology: Topology, sequences_per_chip: int | None) -> Found:
  """The layout that the run itself has, or that with so many sequences a chip."""
  if sequences_per_chip:
    job = program.with_sequences(job, sequences_per_chip)
  return _compile(job, topology, topology.devices())


def search(
  job: program.Job,
  topology: Topology,
  sequences_per_chip: int | None,
  seconds: int,
  console: rich.console.Console,
) -> Found:
  """The layout with the least roofline time a token among those compiled in time that fit.

  Its facts have `candidates` and `flags` besides.

  Raises:
    UserError: no layout is legal, or none of the compiled ones fits.
  """
  devices, start = topology.devices(), time.monotonic()
  network = Network(topology, devices)
  guesses = [
    (candidates.guess(layout, topology, network), layout)
    for layout in candidates.layouts(job, topology, sequences_per_chip)
  ]
  if not guesses:
    raise UserError(
      f'No mesh of {topology.size} chips divides the model and batch_size={job.run.batch_size} of '
      f'config.runs.{job.name}: change --topology, or give --sequences_per_chip.'
    )
  limit = candidates.SLACK * topology.chip.hbm_bytes
  hopeful = [pair for pair in guesses if pair[0].peak_bytes <= limit]
  hopeful = sorted(hopeful or guesses, key=lambda pair: pair[0].seconds_per_token)
  done: list[Found] = []
  with _progress(console) as progress:
    task = progress.add_task('', total=seconds)
    for number, (_, layout) in enumerate(hopeful):
      longest = max((found.facts['compile_seconds'] for found in done), default=0.0)
      elapsed = time.monotonic() - start
      if done and elapsed + longest > seconds:
        break
      progress.update(
        task, completed=min(elapsed, seconds),
        description=f'{number + 1} of {len(hopeful)}: {_layout_text(layout)}',
      )  # fmt: skip
      done.append(_compile(layout, topology, devices))
  done.sort(key=lambda found: found.seconds_per_token)
  console.print(_table(done), '')
  best = done[0]
  if not best.facts['fits']:
    raise UserError(
      f'None of the {len(done)} layouts compiled of {len(hopeful)} fits {topology.name}: give more '
      'chips, fewer --sequences_per_chip, or a longer --search_seconds.'
    )
  flags = _flags(job, best.job)
  console.print('The best of them:', *flags, sep='\n  ', end='\n\n')
  rows = [_row(found.facts) for found in done]
  return Found(best.job, best.compiled, best.facts | {'candidates': rows, 'flags': flags})


def _compile(job: program.Job, topology: Topology, devices: Sequence[Any]) -> Found:
  mesh = program.make_mesh(job, devices, topology.flag)
  compiled = program.compile_step(job, mesh)
  return Found(job, compiled, report.facts(job, topology, mesh, compiled))


def _flags(asked: program.Job, best: program.Job) -> list[str]:
  """The command line's overrides that turn one layout into another."""
  prefix = f'--config.runs.{asked.name}'
  before, after = asked.run, best.run
  sizes = [(f'mesh.{axis}', axis) for axis in ('data', 'fsdp', 'expert', 'tensor')]
  changes = [
    *((key, getattr(before.mesh, axis), getattr(after.mesh, axis)) for key, axis in sizes),
    ('batch_size', before.batch_size, after.batch_size),
    ('grad_accum_steps', before.grad_accum_steps, after.grad_accum_steps),
    ('compute.remat', before.compute.remat, after.compute.remat),
  ]
  return [f'{prefix}.{key}={new}' for key, old, new in changes if old != new]


def _row(facts: dict[str, Any]) -> dict[str, Any]:
  keys = ('mesh', 'grad_accum_steps', 'sequences_per_chip', 'fits', 'peak_bytes')
  row = {key: facts[key] for key in keys} | {'remat': facts['compute']['remat']}
  if facts['fits']:
    bounds = {name: facts['seconds'][name] for name in report.BOUNDS}
    row |= {'seconds': bounds, 'mfu': facts['mfu']}
  return row


def _table(done: Sequence[Found]) -> rich.table.Table:
  table = rich.table.Table(title='Layouts compiled', title_justify='left', box=None, pad_edge=False)
  for column in ('mesh', 'remat'):
    table.add_column(column)
  for column in ('sequences a chip', 'peak', 'roofline', 'MFU', 'in order', 'MFU'):
    table.add_column(column, justify='right')
  for facts in (found.facts for found in done):
    peak = '-' if facts['peak_bytes'] is None else f'{facts["peak_bytes"] / 1e9:.1f} GB'
    cells = ['does not fit']
    if facts['fits']:
      cells = [
        text for name in ('roofline', 'in_order')
        for text in (f'{1e3 * facts["seconds"][name]:.0f} ms', f'{facts["mfu"][name]:.1%}')
      ]  # fmt: skip
    table.add_row(
      report.mesh_text(facts['mesh']), facts['compute']['remat'], str(facts['sequences_per_chip']),
      peak, *cells,
    )  # fmt: skip
  return table


def _layout_text(job: program.Job) -> str:
  mesh = report.mesh_text(vars(job.run.mesh))
  return f'{mesh}, remat {job.run.compute.remat}, {job.sequences_per_chip} a chip'


def _progress(console: rich.console.Console) -> rich.progress.Progress:
  columns = (
    rich.progress.BarColumn(20),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TextColumn('{task.description}'),
  )
  return rich.progress.Progress(*columns, console=console)
