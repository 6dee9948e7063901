"""Regenerates the tables of docs/aot.md: compiles the paper's models for TPUs, and analyses them.

    python benchmarks/aot_table.py --write=docs/aot.md
    python benchmarks/aot_table.py --write=docs/aot.md --tables=decode

Takes one to two minutes a row on two cores, half a minute for decoding, and requires
`pip install 'jax[tpu]'`. Every row is one call of `python -m bam_jax.aot`, which is printed.
"""

import dataclasses
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from absl import app, flags

ROOT = Path(__file__).parent.parent
START, END = '<!-- {} made by benchmarks/aot_table.py -->', '<!-- end -->'
GIB = 2**30
SEVEN_B = dict(
  vocab_size=32_000, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128,
  ffn_dim=11_008, tied_embeddings=False, norm='rmsnorm', rotary_layout='half',
)  # fmt: skip
RUNS = ('seed', 'btx', 'bam_shared_kv', 'bam_kv')


@dataclass(frozen=True)
class Step:
  """A train step to compile."""

  run: str
  topology: str
  sequences: int  # a chip
  fsdp: int
  expert: int
  remat: str = 'full'
  block: str = ''  # of a model of Llama 2 7B's shape, instead of the recipe's own model
  top_k: int = 0  # attention experts a token visits; 0: all

  columns: ClassVar = (
    'run', 'topology', 'fsdp x expert', 'sequences a chip', 'remat', 'peak GiB', 'compiled / model',
    'gather GB', 'scatter GB', 'all-reduce GB', 'HBM GB', 'roofline ms', 'MFU', 'in order ms',
    'MFU',
  )  # fmt: skip
  names: ClassVar = 3  # columns that are not numbers

  def command(self) -> list[str]:
    key = f'--config.runs.{self.run}'
    return [
      '--config=configs/large_2b.py', f'--run={self.run}', f'--topology={self.topology}',
      f'--sequences_per_chip={self.sequences}', f'{key}.mesh.fsdp={self.fsdp}',
      f'{key}.mesh.expert={self.expert}', f'{key}.compute.remat={self.remat}',
      *self.shape(),
      *([f'{key}.init.upcycle.attention_top_k={self.top_k}'] if self.top_k else []),
    ]  # fmt: skip

  @property
  def name(self) -> str:
    """The run, and in what it differs from the recipe's."""
    block = f', {self.block} block' if self.block else ''
    return f'{self.run}{block}{f", top-{self.top_k} attention" if self.top_k else ""}'

  def shape(self) -> list[str]:
    """Flags of the model's shape."""
    changes = SEVEN_B | {'block': self.block} if self.block else {}
    return [f'--config.model.{key}={value}' for key, value in changes.items()]

  def cells(self, facts: dict[str, Any], btx: dict[str, Any] | None) -> list[str]:
    """A row of Markdown."""
    peak = facts['peak_bytes']
    what = [
      self.name, self.topology, f'{self.fsdp} x {self.expert}', str(self.sequences), self.remat,
      '-' if peak is None else f'{peak / GIB:.1f}',
    ]  # fmt: skip
    if not facts['fits']:
      return [*what, 'does not fit', *[''] * (len(self.columns) - len(what) - 1)]
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
      f'{wire["reduce-scatter"]:.2f}', f'{wire["all-reduce"]:.2f}',
      f'{facts["hbm_bytes"] / 1e9:.0f}', *bounds,
    ]  # fmt: skip


@dataclass(frozen=True)
class Token:
  """A decode step to compile."""

  run: str
  config: str
  topology: str
  batch: int
  expert: int
  tensor: int = 1

  columns: ClassVar = (
    'model', 'run', 'topology', 'expert x tensor', 'batch', 'peak GiB', 'HBM GB', 'over needed',
    'collectives', 'wire MB', 'wire ms', 'roofline ms', 'over BTX', 'tokens/s', 'no overlap ms',
  )  # fmt: skip
  names: ClassVar = 4

  def command(self) -> list[str]:
    key = f'--config.runs.{self.run}.mesh'
    return [
      f'--config=configs/{self.config}.py', f'--run={self.run}', f'--topology={self.topology}',
      '--phase=decode', '--context=272', f'--batch_size={self.batch}', f'{key}.data=1',
      f'{key}.fsdp=1', f'{key}.expert={self.expert}', f'{key}.tensor={self.tensor}',
    ]  # fmt: skip

  def cells(self, facts: dict[str, Any], btx: dict[str, Any] | None) -> list[str]:
    """A row of Markdown; every one fits."""
    seconds = facts['seconds']
    ratio = f'{seconds["roofline"] / btx["seconds"]["roofline"]:.2f}' if btx else ''
    return [
      self.config, self.run, self.topology, f'{self.expert} x {self.tensor}', str(self.batch),
      f'{facts["peak_bytes"] / GIB:.2f}', f'{facts["hbm_bytes"] / 1e9:.2f}',
      f'{facts["hbm_ratio"]:.2f}', f'{sum(c["count"] for c in facts["collectives"])}',
      f'{sum(c["wire_bytes"] for c in facts["collectives"]) / 1e6:.2f}',
      f'{1e3 * sum(seconds["wire"].values()):.3f}', f'{1e3 * seconds["roofline"]:.2f}', ratio,
      f'{facts["tokens_per_second"]["roofline"]:,.0f}', f'{1e3 * seconds["no_overlap"]:.2f}',
    ]  # fmt: skip


def tokens(config: str, topology: str, batches: Sequence[int], **mesh: int) -> list[Token]:
  """The mixtures in turn, for each batch."""
  return [
    Token(run, config, topology, batch, **mesh)
    for batch, run in itertools.product(batches, RUNS[1:])
  ]


TABLES = {
  'variants': (
    'Every variant, everything recomputed',
    [Step(run, 'v5e:4x4', 2, 4, 4) for run in RUNS],
  ),
  'fsdp': (
    'A plain mixture of 4 experts (BTX), parameters sharded over all chips',
    [
      Step('btx', 'v5e:4x4', 2, 16, 1, 'matmuls'),
      Step('btx', 'v5e:4x4', 2, 16, 1),
      Step('btx', 'v5p:2x2x2', 4, 8, 1, 'matmuls'),
      Step('btx', 'v5p:2x2x2', 4, 8, 1),
    ],
  ),
  'expert': (
    'The same mixture with one expert per chip',
    [Step('btx', 'v5p:2x2x2', 4, 2, 4, remat) for remat in ('matmuls', 'attention', 'full')],
  ),
  'pod': (
    'BAM on 64 chips',
    [
      *(Step(run, 'v5p:4x4x4', 4, 16, 4, 'matmuls') for run in RUNS[1:]),
      *(Step(run, 'v5p:4x4x4', 4, 16, 4, 'none') for run in RUNS[1:]),
      Step('bam_shared_kv', 'v5p:4x4x4', 4, 16, 4, 'none', top_k=1),
    ],
  ),
  'blocks': (
    "What the parallel block saves: four experts of Llama 2 7B's shape, and the same in turn",
    [
      Step('bam_kv', topology, 1, chips // 4, 4, block=block)
      for topology, chips in (('v5p:4x4x4', 64), ('v5e:16x16', 256))
      for block in ('sequential', 'parallel')
    ],
  ),
  'decode': (
    'Generation: one token of each row, prompt 256 and 16 new tokens',
    [
      *tokens('small_590m', 'v5e:2x2', (1, 16), expert=4),
      *tokens('large_2b', 'v5e:2x2', (1, 8, 16), expert=4),
      *tokens('large_2b', 'v5p:2x2x1', (1, 16), expert=4),
      *tokens('small_590m', 'v5e:2x2', (1,), expert=1, tensor=4),
      *tokens('large_2b', 'v5e:2x2', (1,), expert=2, tensor=2),
      *tokens('small_590m', 'v5e:1x1', (1,), expert=1),
    ],
  ),
}  # fmt: skip
OVERHEAD = 'over BTX', 'model FLOPs', 'compiled', 'wire', 'peak', 'roofline', 'in order'

_WRITE = flags.DEFINE_string('write', None, 'Markdown file to update between its markers.')
_TABLES = flags.DEFINE_multi_enum('tables', list(TABLES), list(TABLES), 'Which tables to make.')


def compile_row(row: Step | Token) -> dict[str, Any]:
  """The `--json` results of one row."""
  command = [sys.executable, '-m', 'bam_jax.aot', *row.command(), '--json=-']
  print(shlex.join(['python', *command[1:]]), file=sys.stderr, flush=True)
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(done.stderr.strip())
  return json.loads(done.stdout)


def overhead(row: Step, facts: dict[str, Any], btx: dict[str, Any]) -> list[str]:
  """The cost of the attention experts relative to BTX under the same layout."""
  wire = [sum(c['wire_bytes'] for c in one['collectives']) for one in (facts, btx)]
  ratios = (
    facts['model_flops'] / btx['model_flops'],
    facts['compiled_flops']['total'] / btx['compiled_flops']['total'],
    wire[0] / wire[1],
    facts['peak_bytes'] / btx['peak_bytes'],
    *(facts['seconds'][name] / btx['seconds'][name] for name in ('roofline', 'in_order')),
  )
  return [f'{row.name}, {row.remat}', *(f'{ratio:.2f}' for ratio in ratios)]


def markdown(columns: Sequence[str], names: int, body: Sequence[Sequence[str]]) -> list[str]:
  """A table whose first columns are names."""
  rule = ['---'] * names + ['---:'] * (len(columns) - names)
  return [f'| {" | ".join(cells)} |' for cells in (columns, rule, *body)]


def make(title: str, rows: Sequence[Step | Token]) -> str:
  """A table, with the command of its first row."""
  made: dict[Step | Token, dict[str, Any]] = {}
  body, beside = [], []
  for row in rows:
    facts = made[row] = compile_row(row)
    changes = {'top_k': 0} if isinstance(row, Step) else {}
    btx = made.get(dataclasses.replace(row, run='btx', **changes))
    body.append(row.cells(facts, btx))
    print(' | '.join(body[-1]), file=sys.stderr, flush=True)
    if isinstance(row, Step) and row.run.startswith('bam') and btx and facts['fits']:
      beside.append(overhead(row, facts, btx))
  versions = ', '.join(f'{name} {number}' for name, number in facts['versions'].items())
  example = shlex.join(['python', '-m', 'bam_jax.aot', *rows[0].command()])
  lines = [f'### {title}', '', f'{versions}. The first row:', '', '```', example, '```', '']
  lines += markdown(rows[0].columns, rows[0].names, body)
  if beside:
    lines += ['', "Cost of BAM's attention experts relative to BTX:", '']
    lines += markdown(OVERHEAD, 1, beside)
  return '\n'.join(lines)


def main(argv: list[str]) -> None:
  del argv
  for name in _TABLES.value:
    text = make(*TABLES[name])
    if not _WRITE.value:
      print(text, '')
      continue
    path, start = Path(_WRITE.value), START.format(name)
    before, found, rest = path.read_text(encoding='utf-8').partition(start)
    if not found:
      raise SystemExit(f'{path} has no line {start}')
    after = rest.partition(END)[2]
    path.write_text(f'{before}{start}\n\n{text}\n\n{END}{after}', encoding='utf-8')


if __name__ == '__main__':
  app.run(main)
