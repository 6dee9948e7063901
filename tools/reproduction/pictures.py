"""The pictures of the pages of results, from the facts of the seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from bam_jax.reports import figures
from tools.reproduction import compare, pages, paper
from tools.reproduction.compare import COLUMNS, Seeds
from tools.reproduction.recipe import budgets, reproduction

# Okabe and Ito's palette, safe for the colour-blind, without its yellow, too pale for a line.
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00', '#5b5b5b')
PANELS = {'seed': 'Seed', 'specialist': 'Specialists', 'mixture': 'Mixtures'}
CURVES = ('seed', 'code', 'law', 'math', 'btx', 'btx_6_top3', *pages.BAMS, 'dense')
SAME_BATCHES = ('bam_kv', 'bam_shared_kv', 'btx_6_top3', 'average', 'sparse', 'dense')  # as BTX
EQUAL_COMPUTE = 'equal_compute.png'
ROUTED = ('btx', 'bam_kv', 'bam_shared_kv')
COMPARED = (
  *pages.BAMS, 'bam_shared_top2', 'bam_shared_top1', 'bam_top2', 'bam_top1', 'btx_6_top3',
  'btx_5', 'btx_6', 'btx_7', 'btx_8', 'sparse', 'average', 'dense',
)  # fmt: skip


def draw(seeds: Seeds, folder: Path) -> dict[str, str]:
  """Draws what there are runs for; file names, and what each shows."""
  folder.mkdir(parents=True, exist_ok=True)
  drawn = {}
  if any('btx' in seed['runs'] for seed in seeds):
    drawn['against_btx.png'] = 'Perplexity of each run against BTX'
    against_btx(folder / 'against_btx.png', seeds)
  if any(any(pages.sweep(seeds, name).values()) for name in reproduction.SWEPT):
    drawn['learning_rates.png'] = 'Perplexity by peak learning rate'
    learning_rates(folder / 'learning_rates.png', seeds)
  first = seeds[0]['runs'] if seeds else {}
  # What is trained on as the mixtures are stands among them.
  kinds = {'dense': {'kind': 'mixture'}}
  rows = [{'run': name} | first[name] | kinds.get(name, {}) for name in CURVES if name in first]
  if rows:
    drawn['loss_curves.png'] = f'Loss by step, seed {seeds[0]["seed"]}'
    metrics = {row['run']: _metrics(row) for row in rows}
    loss_curves(folder / 'loss_curves.png', rows, metrics)
  if any({'btx', name} <= seed['runs'].keys() for seed in seeds for name in SAME_BATCHES):
    drawn['loss_against_btx.png'] = 'Training loss against that of BTX on the same batches'
    loss_against_btx(folder / 'loss_against_btx.png', seeds)
  for row in rows:
    if row['run'] in ROUTED:
      name = f'routing_{row["run"]}.png'
      drawn[name] = f'Routing of {row["label"]}, seed {seeds[0]["seed"]}'
      figures.routing(folder / name, row)
  return drawn


def loss_curves(
  path: Path, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
  """Draws the negative log-likelihood of each run in training, and its held-out loss as dots.

  `metrics` are the lines of each run, in order of steps.
  """
  kinds = [kind for kind in PANELS if any(row['kind'] == kind for row in rows)]
  with figures.style():
    figure = Figure(figsize=(1.0 + 3.4 * len(kinds), 3.2), layout='constrained')
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axis, kind in zip(axes, kinds):
      for i, row in enumerate(row for row in rows if row['kind'] == kind):
        _loss_curve(axis, row, metrics[row['run']], COLOURS[i % len(COLOURS)])
      axis.set(title=PANELS[kind], xlabel='step')
      axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
      if axis.get_legend_handles_labels()[0]:
        axis.legend(handlelength=1.4)
    axes[0].set_ylabel('loss (nats per token)')
    figures.save(figure, path)


def _loss_curve(
  axis: Axes, row: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], colour: str
) -> None:
  train = np.array([(line['step'], line['nll']) for line in lines if 'nll' in line])
  if len(train):
    axis.plot(*train.T, color=colour, alpha=0.22, linewidth=0.8)
    axis.plot(train[:, 0], smooth(train[:, 1]), color=colour, label=row['label'])
  held_out = [(line['step'], valid_loss(row, line['valid'])) for line in lines if line.get('valid')]
  if held_out:
    dots = dict(marker='o', linestyle='', markersize=4.5, markeredgecolor='white', clip_on=False)
    axis.plot(*np.array(held_out).T, color=colour, **dots)


def smooth(values: np.ndarray) -> np.ndarray:
  """The mean over about a tenth of the run, centred but for its end."""
  # Symmetric at the start, where a lopsided window would lower a steep curve.
  reaches = enumerate(min(len(values) // 20, i) for i in range(len(values)))
  return np.array([values[i - reach : i + reach + 1].mean() for i, reach in reaches])


def valid_loss(row: Mapping[str, Any], valid: Mapping[str, float]) -> float:
  """A specialist's held-out loss on its own domain, another run's mean over the domains."""
  if row['kind'] == 'specialist' and row['run'] in valid:
    return valid[row['run']]
  return sum(valid.values()) / len(valid)


def against_btx(path: Path, seeds: Seeds) -> None:
  """Draws the change from BTX of each run in each column: a dot a seed, a diamond the paper."""
  names = [name for name in COMPARED if any(name in seed['runs'] for seed in seeds)]
  with figures.style():
    figure = Figure(
      figsize=(2.6 + 1.75 * len(COLUMNS), 1.3 + 0.3 * len(names)), layout='constrained'
    )
    axes = figure.subplots(1, len(COLUMNS), sharey=True)
    for axis, column in zip(axes, COLUMNS):
      axis.axvline(0, color=figures.INK, linewidth=0.8)
      for line, name in enumerate(names):
        changes = compare.changes(seeds, name, 'btx', column)
        values = [100 * value for value in changes.values] if changes else []
        axis.plot(values, [line] * len(values), 'o', color=COLOURS[0], markersize=5, alpha=0.7)
        printed = compare.printed_change(paper.ALL, name, 'btx', column)
        if printed is not None:
          style = dict(color=COLOURS[1], markersize=5, markerfacecolor='none')
          axis.plot([100 * printed], [line], 'D', **style)
      axis.set(title=column, xlabel='%')
      axis.margins(x=0.15)
    axes[0].set_yticks(range(len(names)), [pages.label(name) for name in names])
    axes[0].invert_yaxis()
    figure.supxlabel('perplexity against BTX: dots our seeds, diamonds the paper', fontsize=8)
    figures.save(figure, path)


def loss_against_btx(path: Path, seeds: Seeds) -> None:
  """Draws how the runs on BTX's batches gain on it: a line for each, faint ones for each seed."""
  with figures.style():
    figure = Figure(figsize=(6.4, 3.6), layout='constrained')
    axis = figure.subplots()
    axis.axhline(0, color=figures.INK, linewidth=0.8)
    for colour, name in zip(COLOURS, SAME_BATCHES):
      pairs = [
        (dict(seed['runs'][name]['nll']), dict(seed['runs']['btx']['nll']))
        for seed in seeds
        if {'btx', name} <= seed['runs'].keys()
      ]
      if not pairs:
        continue
      steps = sorted(set.intersection(*(set(losses) for pair in pairs for losses in pair)))
      gaps = [smooth(np.array([run[s] - btx[s] for s in steps])) for run, btx in pairs]
      axis.plot(steps, np.transpose(gaps), color=colour, alpha=0.22, linewidth=0.8)
      axis.plot(steps, np.mean(gaps, axis=0), color=colour, label=pages.label(name))
    axis.set(xlabel='step', ylabel='loss less that of BTX (nats per token)')
    axis.legend()
    figures.save(figure, path)


def equal_compute(path: Path, seeds: Seeds) -> None:
  """Draws average perplexity by budget: the mean over the seeds, and a dot for each."""
  names, times = list(budgets.BUDGETS), list(budgets.BUDGETS.values())
  with figures.style():
    figure = Figure(figsize=(8.0, 3.6), layout='constrained')
    whole, trained = figure.subplots(1, 2)
    for axis, first in ((whole, 0), (trained, 1)):
      for colour, name in zip(COLOURS, budgets.MIXTURES):
        for start, line in zip(budgets.STARTS, ('--', '-')):
          runs = [f'{name}_{start}_{budget}' for budget in names]
          points = [compare.perplexities(seeds, run, compare.AVERAGE) for run in runs]
          there = [(x, some) for x, some in list(zip(times, points))[first:] if some]
          style = dict(color=colour, linestyle=line, label=pages.mixture_label(name, start))
          axis.plot([x for x, _ in there], [some.mean for _, some in there], **style)
          dots = [(x, value) for x, some in there for value in some.values]
          if dots:
            axis.plot(*zip(*dots), 'o', color=colour, markersize=3.5, alpha=0.7)
      axis.set(xlabel="training FLOPs, over those of the quick start's BTX")
    whole.set(ylabel='average perplexity')
    trained.set_xscale('log')
    trained.set_xticks(times[1:], ['1/3', *(f'{x:g}' for x in times[2:])])
    trained.xaxis.set_minor_locator(NullLocator())
    trained.legend(fontsize=7)
    figures.save(figure, path)


def learning_rates(path: Path, seeds: Seeds) -> None:
  """Draws average perplexity by peak learning rate: the mean over the seeds, and a dot for each."""
  with figures.style():
    figure = Figure(figsize=(4.4, 3.2), layout='constrained')
    axis = figure.subplots()
    for colour, name in zip(COLOURS, reproduction.SWEPT):
      there = {peak: some for peak, some in sorted(pages.sweep(seeds, name).items()) if some}
      means = [some.mean for some in there.values()]
      axis.plot(list(there), means, color=colour, label=pages.label(name))
      dots = [(peak, value) for peak, some in there.items() for value in some.values]
      if dots:
        axis.plot(*zip(*dots), 'o', color=colour, markersize=4.5)
    axis.set_xscale('log')
    axis.set_xticks(reproduction.PEAKS)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda peak, _: f'{peak:g}'))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel='peak learning rate', ylabel='average perplexity')
    axis.legend()
    figures.save(figure, path)


def _metrics(row: dict[str, Any]) -> list[dict[str, Any]]:
  # Without the last held-out loss, which some runs have over more text than those before.
  return [
    *({'step': step, 'nll': nll} for step, nll in row['nll']),
    *({'step': step, 'valid': valid} for step, valid in row['valid'] if step < row['step']),
  ]
