"""Remakes the tables of docs/aot.md: compiles the paper's large models for TPUs, and reads them.

    python benchmarks/aot_table.py --write=docs/aot.md

Takes a minute or two a row on two cores, and needs `pip install 'jax[tpu]'`. Every row is one call
of `python -m bam_jax.aot`, printed with it. `--only=REGEX` makes the rows whose command matches.
"""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import app, flags

ROOT = Path(__file__).parent.parent
START, END = '<!-- made by benchmarks/aot_table.py -->', '<!-- end -->'
GIB = 2**30

_WRITE = flags.DEFINE_string('write', None, 'A Markdown file: what lies between its markers.')
_ONLY = flags.DEFINE_string('only', '', 'Rows whose command matches this regular expression.')


@dataclass(frozen=True)
class Row:
  """One step to compile."""

  run: str
  topology: str
  sequences: int  # a chip
  fsdp: int
  expert: int
  remat: str = 'full'

  def command(self) -> list[str]:
    key = f'--config.runs.{self.run}'
    return [
      '--config=configs/large_2b.py', f'--run={self.run}', f'--topology={self.topology}',
      f'--sequences_per_chip={self.sequences}', f'{key}.mesh.fsdp={self.fsdp}',
      f'{key}.mesh.expert={self.expert}', f'{key}.compute.remat={self.remat}',
    ]  # fmt: skip


RUNS = ('seed', 'btx', 'bam_shared_kv', 'bam_kv')
TABLES = {
  'Every variant, everything recomputed': (*(Row(run, 'v5e:4x4', 2, 4, 4) for run in RUNS),),
  'A plain mixture of 4 experts (BTX), parameters cut over all chips': (
    Row('btx', 'v5e:4x4', 2, 16, 1, 'matmuls'),
    Row('btx', 'v5e:4x4', 2, 16, 1),
    Row('btx', 'v5p:2x2x2', 4, 8, 1, 'matmuls'),
    Row('btx', 'v5p:2x2x2', 4, 8, 1),
  ),
  'BAM on 64 chips': (
    Row('btx', 'v5p:4x4x4', 4, 16, 4, 'matmuls'),
    Row('bam_shared_kv', 'v5p:4x4x4', 4, 16, 4, 'matmuls'),
    Row('bam_kv', 'v5p:4x4x4', 4, 16, 4, 'matmuls'),
  ),
}
COLUMNS = (
  'run', 'topology', 'fsdp x expert', 'sequences a chip', 'remat', 'peak GiB', 'compiled / model',
  'gather GB', 'scatter GB', 'all-reduce GB', 'HBM GB', 'roofline ms', 'MFU', 'in order ms', 'MFU',
)  # fmt: skip


def compile_row(row: Row) -> dict[str, Any]:
  """The facts of one row."""
  command = [sys.executable, '-m', 'bam_jax.aot', *row.command(), '--json=-']
  print(shlex.join(['python', *command[1:]]), file=sys.stderr, flush=True)
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(done.stderr.strip())
  return json.loads(done.stdout)


def cells(row: Row, facts: dict[str, Any]) -> list[str]:
  """A row of Markdown."""
  peak = facts['peak_bytes']
  what = [
    row.run, row.topology, f'{row.fsdp} x {row.expert}', str(row.sequences), row.remat,
    '-' if peak is None else f'{peak / GIB:.1f}',
  ]  # fmt: skip
  if not facts['fits']:
    return [*what, 'does not fit', *[''] * (len(COLUMNS) - len(what) - 1)]
  wire = dict.fromkeys(('all-gather', 'reduce-scatter', 'all-reduce'), 0.0)
  for collective in facts['collectives']:
    wire[collective['kind']] = wire.get(collective['kind'], 0.0) + collective['wire_bytes'] / 1e9
  bounds = [
    text
    for name in ('roofline', 'in_order')
    for text in (f'{1e3 * facts["seconds"][name]:.0f}', f'{facts["mfu"][name]:.1%}')
  ]
  return [
    *what, f'{facts["flops_ratio"]:.3f}', f'{wire["all-gather"]:.2f}',
    f'{wire["reduce-scatter"]:.2f}', f'{wire["all-reduce"]:.2f}', f'{facts["hbm_bytes"] / 1e9:.0f}',
    *bounds,
  ]  # fmt: skip


def overhead(made: list[tuple[Row, dict[str, Any]]]) -> list[str]:
  """What the attention experts cost beside BTX under the same layout, a token."""
  lines = []
  layout = lambda row: (row.topology, row.fsdp, row.expert, row.sequences, row.remat)
  for row, facts in made:
    base = next((b for r, b in made if r.run == 'btx' and layout(r) == layout(row)), None)
    if not row.run.startswith('bam') or not (base and base['fits'] and facts['fits']):
      continue
    wire = [sum(c['wire_bytes'] for c in one['collectives']) for one in (facts, base)]
    ratios = (
      facts['model_flops'] / base['model_flops'],
      facts['compiled_flops']['total'] / base['compiled_flops']['total'],
      wire[0] / wire[1],
      facts['peak_bytes'] / base['peak_bytes'],
      *(facts['seconds'][name] / base['seconds'][name] for name in ('roofline', 'in_order')),
    )
    name = f'{row.run}, {row.topology}, remat {row.remat}'
    lines.append(f'| {name} | ' + ' | '.join(f'{ratio:.2f}' for ratio in ratios) + ' |')
  head = ['over BTX', 'model FLOPs', 'compiled', 'wire', 'peak', 'roofline', 'in order']
  return [*heading(head, 1), *lines] if lines else []


def heading(columns: list[str] | tuple[str, ...], names: int) -> list[str]:
  """The first two lines of a table whose first columns are names."""
  rule = ['---'] * names + ['---:'] * (len(columns) - names)
  return [f'| {" | ".join(columns)} |', f'| {" | ".join(rule)} |']


def main(argv: list[str]) -> None:
  del argv
  lines, made = [], []
  for title, rows in TABLES.items():
    rows = [row for row in rows if re.search(_ONLY.value, shlex.join(row.command()))]
    if not rows:
      continue
    body = []
    for row in rows:
      made.append((row, compile_row(row)))
      body.append(f'| {" | ".join(cells(*made[-1]))} |')
      print(body[-1], file=sys.stderr, flush=True)
    versions = ', '.join(f'{name} {number}' for name, number in made[-1][1]['versions'].items())
    example = shlex.join(['python', '-m', 'bam_jax.aot', *rows[0].command()])
    lines += [f'### {title}', '', f'{versions}. The first row:', '', '```', example, '```', '']
    lines += [*heading(COLUMNS, 3), *body, '']
  lines += ["### What BAM's attention experts cost beside BTX", '', *overhead(made), '']
  text = '\n'.join(lines)
  if not _WRITE.value:
    print(text)
    return
  path = Path(_WRITE.value)
  before, _, rest = path.read_text(encoding='utf-8').partition(START)
  after = rest.partition(END)[2]
  path.write_text(f'{before}{START}\n\n{text}\n{END}{after}', encoding='utf-8')


if __name__ == '__main__':
  app.run(main)
