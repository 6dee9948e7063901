"""The drawn parts of docs/results.md, each a function of the facts of the seeds."""

import re
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path

from bam_jax import readings, recipes
from bam_jax.errors import UserError
from bam_jax.train.progress import duration
from configs import reproduction
from tools.reproduction import compare
from tools.reproduction.compare import AVERAGE, COLUMNS, Seeds, Spread, spread
from tools.reproduction.facts import Run

MISSING = 'missing'  # a run that no seed has finished
ABSENT = '–'  # what the paper did not print

RUNS = reproduction.branches() | reproduction.main_runs() | reproduction.ablations()
SWEEP = reproduction.learning_rates()
BUDGETS = reproduction.budgets()
BAMS = ('bam_kv', 'bam_shared_kv', 'bam_kv_cm', 'bam_shared_kv_cm')
SUMMARY = ('seed', 'btx', 'btx_6_top3', 'bam_shared_kv_cm', 'bam_kv_cm', 'bam_shared_kv', 'bam_kv')

Paper = Callable[[str, str], float | None]  # run, column -> relative change


def label(name: str) -> str:
  """What tables call a run, finished or not."""
  return (RUNS | BUDGETS)[name]['label']


def perplexity(seeds: Seeds) -> str:
  """All runs on all domains."""
  lines = []
  for name in RUNS:
    cells = [compare.perplexities(seeds, name, column) for column in COLUMNS]
    lines.append([label(name), _count(seeds, name), *(_cell(c, readings.number) for c in cells)])
  return _table(['run', 'seeds', *COLUMNS], lines)


def against_seed(seeds: Seeds) -> str:
  """Table 1, as changes from the seed: specialists on their own domain, mixtures on all."""
  paper = lambda name, column: compare.paper_change(name, 'seed', column)
  lines = []
  for domain in recipes.SPECIALTIES:
    lines += _changes(seeds, [domain], 'seed', paper, columns=[domain])
  lines += _changes(seeds, ['btx', *BAMS], 'seed', paper)
  return _table(['against the seed', 'seeds', *COLUMNS], lines)


def against_btx(seeds: Seeds) -> str:
  """Table 1, as changes from BTX."""
  paper = lambda name, column: compare.paper_change(name, 'btx', column)
  return _table(['against BTX', 'seeds', *COLUMNS], _changes(seeds, BAMS, 'btx', paper))


def parameter_matched(seeds: Seeds) -> str:
  """BTX with as many parameters as BAM, total and active, against BTX, and BAM against it."""
  wide = label('btx_6_top3')
  lines = _changes(seeds, ['btx_6_top3'], 'btx', said=' against BTX')
  lines += _changes(seeds, ['bam_kv', 'bam_kv_cm'], 'btx_6_top3', said=f' against {wide}')
  return _table(['run', 'seeds', *COLUMNS], lines)


def routing(seeds: Seeds) -> str:
  """Table 6: soft, top-2 and top-1 attention routing, each with BTX's compute."""
  names = ['bam_kv_cm', 'bam_top2', 'bam_top1']
  lines = _changes(seeds, names, 'btx', compare.paper_routing_change)
  return _table(['against BTX', 'seeds', *COLUMNS], lines)


def other_makings(seeds: Seeds) -> str:
  """What needs no experts of several domains, or no experts at all, on the same data."""
  lines = _changes(seeds, ['sparse', 'average', 'dense'], 'btx')
  return _table(['against BTX', 'seeds', *COLUMNS], lines)


def learning_rates(seeds: Seeds) -> str:
  """Average perplexity of BTX and BAM by peak learning rate."""
  peaks = sorted({run['schedule']['peak_learning_rate'] for run in SWEEP.values()})
  sweeps = {name: sweep(seeds, name) for name in reproduction.SWEPT}
  lines = [
    [f'{peak:g}', *(_cell(by_peak[peak], readings.number) for by_peak in sweeps.values())]
    for peak in peaks
  ]
  return _table(['peak learning rate', *map(label, sweeps)], lines)


def sweep(seeds: Seeds, name: str) -> dict[float, Spread | None]:
  """Average perplexity by peak learning rate of one mixture, of the seeds that were swept."""
  others = SWEEP.keys() - RUNS.keys()
  swept = [seed for seed in seeds if others & seed['runs'].keys()]
  return {
    run['schedule']['peak_learning_rate']: compare.perplexities(swept, of_peak, AVERAGE)
    for of_peak, run in SWEEP.items()
    if of_peak == name or of_peak.startswith(f'{name}_')
  }


def summary(seeds: Seeds) -> str:
  """The comparison in one table, for the README."""
  lines = []
  for name in SUMMARY:
    paper = compare.paper_change(name, 'btx', AVERAGE)
    flops = [
      _flops(seed['runs'][name]) / _flops(seed['runs']['btx'])
      for seed in seeds
      if {name, 'btx'} <= seed['runs'].keys()
    ]
    lines.append(
      [
        label(name),
        _cell(compare.perplexities(seeds, name, AVERAGE), readings.number),
        _cell(compare.changes(seeds, name, 'btx', AVERAGE), _percent),
        ABSENT if paper is None else f'*{_percent(paper)}*',
        f'{flops[0]:.2f}' if flops else MISSING,
      ]
    )
  header = ['run', 'average perplexity', 'against BTX', 'the paper', "of BTX's training FLOPs"]
  return _table(header, lines)


def budgets(seeds: Seeds) -> str:
  """BAM against BTX on the same tokens, few and many; what tokens do for BTX; the same compute."""
  pairs = [
    ('bam_kv_cm', 'btx_short'), ('bam_kv', 'btx'), ('btx', 'btx_short'), ('bam_kv_cm', 'btx'),
    ('bam_kv_cm_long', 'btx_long'),
  ]  # fmt: skip
  lines = []
  for name, base in pairs:
    lines += _changes(seeds, [name], base, said=f' against {label(base)}')
  return _table(['run', 'seeds', *COLUMNS], lines)


def vocabulary(seeds: Seeds) -> str:
  """Table 1 of the runs with the large vocabulary, whose seeds are not those of the others."""
  paper = lambda name, column: compare.paper_change(name, 'btx', column)
  names = [name for name in reproduction.COMPARED if name != 'btx']
  return _table(['against BTX', 'seeds', *COLUMNS], _changes(seeds, names, 'btx', paper))


def cost(seeds: Seeds) -> str:
  """Parameters, tokens, FLOPs and time."""
  header = ['run', 'parameters', 'active', 'tokens', 'training FLOPs', "of BTX's", 'wall time']
  finished = lambda name: [seed['runs'][name] for seed in seeds if name in seed['runs']]
  btx, lines = finished('btx'), []
  for name in RUNS:
    if not (runs := finished(name)):
      lines.append([label(name), *[MISSING] * (len(header) - 1)])
      continue
    lines.append(
      [
        label(name),
        *(f'{runs[0][key]:,}' for key in ('parameters', 'active_parameters', 'tokens')),
        f'{_flops(runs[0]):.3g}',
        f'{_flops(runs[0]) / _flops(btx[0]):.2f}' if btx else MISSING,
        _cell(spread([run['wall_seconds'] for run in runs]), duration),
      ]
    )
  return _table(header, lines)


def commands(seeds: Seeds) -> str:
  """What was typed last for each seed, and with which versions."""
  if not seeds:
    return 'No run is collected yet.'
  parts = []
  for seed in seeds:
    if seed['command'] is None:
      parts.append(f'Seed {seed["seed"]} is not finished.')
      continue
    versions = ', '.join(f'{name} {version}' for name, version in seed['versions'].items())
    parts.append(f'Seed {seed["seed"]}, {versions}:\n\n```\n{seed["command"]}\n```')
  return '\n\n'.join(parts)


# By the name that the page's markers give.
SECTIONS: dict[str, Callable[[Seeds], str]] = {
  function.__name__: function
  for function in (
    perplexity,
    against_seed,
    against_btx,
    parameter_matched,
    routing,
    other_makings,
    learning_rates,
    budgets,
    cost,
    commands,
  )
}

# Of runs in another shape, whose facts are in a folder of that name.
APART = {'vocabulary': vocabulary}


def replace(text: str, name: str, content: str, page: Path) -> str:
  """The page with one drawn part changed; UserError when it has no such part, or two."""
  begin = f'<!-- drawn: {name} -->'
  pattern = re.compile(rf'(?s){re.escape(begin)}(?:(?!<!-- drawn: ).)*?<!-- end -->')
  if len(pattern.findall(text)) != 1:
    raise UserError(f'{page} needs {begin} and a later <!-- end --> once, around what is drawn.')
  return pattern.sub(lambda _: f'{begin}\n{content}\n<!-- end -->', text)


def _changes(
  seeds: Seeds,
  names: Iterable[str],
  base: str,
  paper: Paper | None = None,
  *,
  columns: Container[str] = COLUMNS,
  said: str = '',
) -> list[list[str]]:
  """A line of changes for each run, and if `paper` is given the paper's below each."""
  lines = []
  for name in names:
    ours = [_cell(compare.changes(seeds, name, base, column), _percent) for column in COLUMNS]
    named = [(label(name) + said, _count(seeds, name, base), ours)]
    if paper:
      printed = [paper(name, column) for column in COLUMNS]
      theirs = [f'*{_percent(change)}*' if change is not None else ABSENT for change in printed]
      named.append(('*the paper*', '', theirs))
    for head, count, cells in named:
      shown = [cell if column in columns else '' for column, cell in zip(COLUMNS, cells)]
      lines.append([head, count, *shown])
  return lines


def _flops(run: Run) -> float:
  return run['flops_per_token'] * run['tokens']


def _percent(change: float) -> str:
  return readings.percent(round(change, 3) or 0.0, 1)  # no minus before what is printed as zero


def _count(seeds: Seeds, *names: str) -> str:
  return str(sum({*names} <= seed['runs'].keys() for seed in seeds))


def _cell(values: Spread | None, say: Callable[[float], str]) -> str:
  """The mean, and of several seeds the least and the greatest."""
  if values is None:
    return MISSING
  if len(values.values) == 1:
    return say(values.mean)
  return f'{say(values.mean)} ({say(values.low)} to {say(values.high)})'


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  rule = ['---', *['---:'] * (len(header) - 1)]
  return '\n'.join(f'| {" | ".join(line)} |' for line in (header, rule, *lines))
