"""The drawn parts of the pages of results, each a function of the facts of the seeds."""

import functools
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path

from bam_jax.errors import UserError
from bam_jax.reports import scores
from bam_jax.train.log import duration
from tools.reproduction import compare, paper
from tools.reproduction.compare import AVERAGE, COLUMNS, Printed, Seeds, Spread, spread
from tools.reproduction.facts import Run
from tools.reproduction.recipe import budgets as equal_budgets
from tools.reproduction.recipe import paper as recipes
from tools.reproduction.recipe import reproduction

MISSING = 'missing'  # a run that no seed has finished
ABSENT = '–'  # what the paper did not print

RUNS = (
  reproduction.branches()
  | reproduction.main_runs()
  | reproduction.ablations()
  | reproduction.learning_rates()
  | reproduction.starts()
  | reproduction.budgets()
)
VOCABULARY = reproduction.branches(reproduction.VOCABULARY) | reproduction.vocabulary()
BAMS = ('bam_kv', 'bam_shared_kv', 'bam_kv_cm', 'bam_shared_kv_cm')
SUMMARY = ('seed', 'btx', 'btx_6_top3', 'bam_shared_kv_cm', 'bam_kv_cm', 'bam_shared_kv', 'bam_kv')


def label(name: str) -> str:
  """What tables call a run, finished or not."""
  return RUNS[name]['label']


def perplexity(seeds: Seeds, runs: Mapping[str, dict] = RUNS) -> str:
  """All runs on all domains."""
  lines = []
  for name in runs:
    cells = [compare.perplexities(seeds, name, column) for column in COLUMNS]
    lines.append([label(name), _count(seeds, name), *(_cell(c, scores.number) for c in cells)])
  return _table(['run', 'seeds', *COLUMNS], lines)


def against_seed(seeds: Seeds) -> str:
  """Table 1, as changes from the seed: specialists on their own domain, mixtures on all."""
  lines = []
  for domain in recipes.SPECIALTIES:
    lines += _changes(seeds, [domain], 'seed', paper.TABLE_1, columns=[domain])
  lines += _changes(seeds, ['btx', *BAMS], 'seed', paper.TABLE_1)
  return _table(['against the seed', 'seeds', *COLUMNS], lines)


def against_btx(seeds: Seeds) -> str:
  """Table 1, as changes from BTX."""
  lines = _changes(seeds, BAMS, 'btx', paper.TABLE_1)
  return _table(['against BTX', 'seeds', *COLUMNS], lines)


def more_experts(seeds: Seeds) -> str:
  """Table 4: BTX with more and more experts, of which one serves a token, against BTX of 4."""
  names = ['bam_kv', *(f'btx_{n}' for n in reproduction.MORE_EXPERTS)]
  lines = _changes(compare.alike(seeds, names), names, 'btx', paper.TABLE_4)
  return _table(['against BTX', 'seeds', *COLUMNS], lines)


def parameter_matched(seeds: Seeds) -> str:
  """Table 5: BTX with as many parameters as BAM, total and active."""
  wide = label('btx_6_top3')
  lines = _changes(seeds, ['btx_6_top3'], 'btx', paper.TABLE_5, said=' against BTX')
  lines += _changes(seeds, ['bam_kv'], 'btx_6_top3', paper.TABLE_5, said=f' against {wide}')
  lines += _changes(seeds, ['bam_kv_cm'], 'btx_6_top3', said=f' against {wide}')
  return _table(['run', 'seeds', *COLUMNS], lines)


def routing(seeds: Seeds) -> str:
  """Table 6: soft, top-2 and top-1 attention routing, each with BTX's compute."""
  shared = ['bam_shared_kv_cm', 'bam_shared_top2', 'bam_shared_top1']
  experts = ['bam_kv_cm', 'bam_top2', 'bam_top1']
  lines = _changes(compare.alike(seeds, shared), shared, 'btx', paper.TABLE_6)
  lines += _changes(compare.alike(seeds, experts), experts, 'btx')
  return _table(['against BTX', 'seeds', *COLUMNS], lines)


def other_makings(seeds: Seeds) -> str:
  """What needs no experts of several domains, or no experts at all, on the same data."""
  names = ['sparse', 'average', 'dense']
  lines = _changes(compare.alike(seeds, names), names, 'btx')
  return _table(['against BTX', 'seeds', *COLUMNS], lines)


def learning_rates(seeds: Seeds) -> str:
  """Average perplexity of BTX and BAM by peak learning rate."""
  sweeps = {name: sweep(seeds, name) for name in reproduction.SWEPT}
  lines = [
    [f'{peak:g}', *(_cell(by_peak[peak], scores.number) for by_peak in sweeps.values())]
    for peak in reproduction.PEAKS
  ]
  return _table(['peak learning rate', *map(label, sweeps)], lines)


def sweep(seeds: Seeds, name: str) -> dict[float, Spread | None]:
  """Average perplexity by peak learning rate of one mixture, of the seeds that were swept."""
  names = {peak: reproduction.at_peak(name, peak) for peak in reproduction.PEAKS}
  swept = compare.alike(seeds, reproduction.learning_rates())
  return {peak: compare.perplexities(swept, run, AVERAGE) for peak, run in names.items()}


def starts(seeds: Seeds) -> str:
  """Other first gates and another warm-up, each against the same mixture without."""
  alike = compare.alike(seeds, reproduction.starts())
  lines = []
  for base in reproduction.STARTED:
    names = [f'{base}_{what}' for what in reproduction.STARTS]
    lines += _changes(alike, names, base, said=f' against {label(base)}')
  for end in ('', *(f'_{what}' for what in reproduction.STARTS)):
    btx, bam = (name + end for name in reproduction.STARTED)
    lines += _changes(alike, [bam], btx, said=f' against {label(btx)}')
  return _table(['run', 'seeds', *COLUMNS], lines)


def summary(seeds: Seeds) -> str:
  """The comparison in one table, for the README."""
  lines = []
  for name in SUMMARY:
    printed = compare.printed_change(paper.ALL, name, 'btx', AVERAGE)
    flops = [
      _flops(seed['runs'][name]) / _flops(seed['runs']['btx'])
      for seed in seeds
      if {name, 'btx'} <= seed['runs'].keys()
    ]
    lines.append(
      [
        label(name),
        _cell(compare.perplexities(seeds, name, AVERAGE), scores.number),
        _cell(compare.changes(seeds, name, 'btx', AVERAGE), _percent),
        ABSENT if printed is None else f'*{_percent(printed)}*',
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
  alike = compare.alike(seeds, reproduction.budgets())
  lines = []
  for name, base in pairs:
    lines += _changes(alike, [name], base, said=f' against {label(base)}')
  return _table(['run', 'seeds', *COLUMNS], lines)


def equal_compute(seeds: Seeds) -> str:
  """Average perplexity of BTX and BAM by training FLOPs, with either start of their routers."""
  budgets = equal_budgets.BUDGETS
  lines = []
  for name in equal_budgets.MIXTURES:
    for start in equal_budgets.STARTS:
      runs = [f'{name}_{start}_{budget}' for budget in budgets]
      cells = [_cell(compare.perplexities(seeds, run, AVERAGE), scores.number) for run in runs]
      lines.append([mixture_label(name, start), _inference(seeds, name, start), *cells])
  header = ['mixture', "FLOPs a token of BTX's", *map(_times, budgets)]
  return _table(header, lines)


def equal_compute_against(seeds: Seeds) -> str:
  """Each BAM against the better of the two BTX of the same seed and budget."""
  budgets, lines = equal_budgets.BUDGETS, []
  for name in list(equal_budgets.MIXTURES)[1:]:
    for start in equal_budgets.STARTS:
      cells = [_cell(against_best(seeds, name, start, budget), _percent) for budget in budgets]
      lines.append([mixture_label(name, start), *cells])
  return _table(['against the better BTX', *map(_times, budgets)], lines)


def against_best(seeds: Seeds, name: str, start: str, budget: str) -> Spread | None:
  """The changes of average perplexity, in the seeds that have the run and every BTX."""
  found = []
  for seed in seeds:
    of = lambda run, seed=seed: compare.perplexity(seed['runs'].get(f'{run}_{budget}'), AVERAGE)
    ours, btx = of(f'{name}_{start}'), [of(f'btx_{other}') for other in equal_budgets.STARTS]
    if ours is not None and None not in btx:
      found.append(ours / min(btx) - 1)
  return spread(found)


def mixture_label(name: str, start: str) -> str:
  """What a mixture is called, and what its routers read and start from."""
  label, _ = equal_budgets.MIXTURES[name]
  return f'{label}, {dict(random="token, random", prefix="prefix, centroids")[start]}'


def _times(budget: str) -> str:
  return '1/3' if budget == '1_3' else budget


def _inference(seeds: Seeds, name: str, start: str) -> str:
  """FLOPs of a token over BTX's: those of a forward pass are a third of training's."""
  flops = {run: facts['flops_per_token'] for seed in seeds for run, facts in seed['runs'].items()}
  ours, btx = flops.get(f'{name}_{start}_0'), flops.get(f'btx_{start}_0')
  return f'{ours / btx:.2f}' if ours and btx else MISSING


def vocabulary(seeds: Seeds) -> str:
  """Table 1 of the runs with the large vocabulary, whose seeds are not those of the others."""
  names = [name for name in reproduction.COMPARED if name != 'btx']
  lines = _changes(seeds, names, 'btx', paper.TABLE_1)
  return _table(['against BTX', 'seeds', *COLUMNS], lines)


def cost(seeds: Seeds, runs: Mapping[str, dict] = RUNS) -> str:
  """Parameters, tokens, FLOPs and time."""
  header = ['run', 'parameters', 'active', 'tokens', 'training FLOPs', "of BTX's", 'wall time']
  finished = lambda name: [seed['runs'][name] for seed in seeds if name in seed['runs']]
  btx, lines = finished('btx'), []
  for name in runs:
    if not (of := finished(name)):
      lines.append([label(name), *[MISSING] * (len(header) - 1)])
      continue
    lines.append(
      [
        label(name),
        *(f'{of[0][key]:,}' for key in ('parameters', 'active_parameters', 'tokens')),
        f'{_flops(of[0]):.3g}',
        f'{_flops(of[0]) / _flops(btx[0]):.2f}' if btx else MISSING,
        _cell(spread([run['wall_seconds'] for run in of]), duration),
      ]
    )
  return _table(header, lines)


def made_with(seeds: Seeds) -> str:
  """Devices and versions, of each seed's last job."""
  lines = []
  for seed in seeds:
    versions = (f'{name} {version}' for name, version in seed['versions'].items())
    facts = ', '.join([*([seed['devices']] if seed['devices'] else []), *versions])
    lines.append(f'- Seed {seed["seed"]}: {facts or "not known"}.')
  return '\n'.join(lines) or 'No run is collected yet.'


# By the name that the page's markers give.
SECTIONS: dict[str, Callable[[Seeds], str]] = {
  function.__name__: function
  for function in (
    perplexity,
    against_seed,
    against_btx,
    more_experts,
    parameter_matched,
    routing,
    other_makings,
    learning_rates,
    starts,
    budgets,
    cost,
    made_with,
  )
}

# Of runs in another shape, whose facts are in a folder of their own.
APART: dict[str, dict[str, Callable[[Seeds], str]]] = {
  'vocabulary': {
    'vocabulary': vocabulary,
    'vocabulary_perplexity': functools.partial(perplexity, runs=VOCABULARY),
    'vocabulary_cost': functools.partial(cost, runs=VOCABULARY),
    'vocabulary_made_with': made_with,
  },
  'budgets': {
    'equal_compute': equal_compute,
    'equal_compute_against': equal_compute_against,
    'equal_compute_made_with': made_with,
  },
}


def replace(texts: dict[Path, str], name: str, content: str) -> None:
  """Changes one drawn part, in place; UserError unless the pages together have it once."""
  begin = f'<!-- drawn: {name} -->'
  pattern = re.compile(rf'(?s){re.escape(begin)}(?:(?!<!-- drawn: ).)*?<!-- end -->')
  found = [page for page, text in texts.items() for _ in pattern.findall(text)]
  if len(found) != 1:
    pages = ' or '.join(map(str, texts))
    raise UserError(f'{pages} needs {begin} and a later <!-- end --> once, around what is drawn.')
  texts[found[0]] = pattern.sub(lambda _: f'{begin}\n{content}\n<!-- end -->', texts[found[0]])


def _changes(
  seeds: Seeds,
  names: Iterable[str],
  base: str,
  table: Printed | None = None,
  *,
  columns: Container[str] = COLUMNS,
  said: str = '',
) -> list[list[str]]:
  """A line of changes for each run, and if a table of the paper is given its own below each."""
  lines = []
  for name in names:
    ours = [_cell(compare.changes(seeds, name, base, column), _percent) for column in COLUMNS]
    named = [(label(name) + said, _count(seeds, name, base), ours)]
    if table:
      printed = [compare.printed_change(table, name, base, column) for column in COLUMNS]
      theirs = [f'*{_percent(change)}*' if change is not None else ABSENT for change in printed]
      named.append(('*the paper*', '', theirs))
    for head, count, cells in named:
      shown = [cell if column in columns else '' for column, cell in zip(COLUMNS, cells)]
      lines.append([head, count, *shown])
  return lines


def _flops(run: Run) -> float:
  return run['flops_per_token'] * run['tokens']


def _percent(change: float) -> str:
  """A relative change, with its sign: +0.2%, −57.0%."""
  change = round(change, 3) or 0.0  # no minus before what is printed as zero
  form = '+.1f' if change < 1e6 else '+.1e'
  return f'{100 * change:{form}}%'.replace('-', '−')


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
