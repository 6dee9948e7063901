"""Pictures of what routers do: heat maps by layer, and checkpoints against each other.

Legend: L layers, E experts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bam_jax.reports import figures

ROUTERS = {'attention': 'attention router', 'ffn': 'FFN router'}
MARKS = 'osD^vPX'  # for those who do not see the colours


def draw(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Draws all pictures of the rows with routers.

  Args:
    folder: where to.
    rows: of `--json`.

  Returns:
    For each picture `file`, `title`, and `label` of its checkpoint or None.
  """
  routed = [row for row in rows if row['routing']]
  by_layer(folder / 'by_layer.png', routed)
  made = [{'file': 'by_layer.png', 'title': 'Layer by layer', 'label': None}]
  for number, row in enumerate(routed):
    for router, by_domain in row['routing'].items():
      file = f'{number}_{router}.png'
      loads = {domain: facts['load'] for domain, facts in by_domain.items()}
      shown = {
        'label': row['label'],
        'experts': row['experts'][router],
        'routing': {router: loads},
      }
      figures.routing(folder / file, shown)
      title = f'{row["label"]}: {ROUTERS[router]}'
      made.append({'file': file, 'title': title, 'label': row['label']})
  return made


def by_layer(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Draws for each router the share with the own expert and the entropy, a line a checkpoint.

  Args:
    path: the PNG to write.
    rows: of `--json`, those with routers.
  """
  routers = [router for router in ROUTERS if any(router in row['routing'] for row in rows)]
  quantities = {
    'own_share': 'share of the tokens with\nthe expert of their domain',
    'entropy': 'entropy of the gates (nats)',
  }
  with figures.style():
    size = (1.2 + 3.6 * len(routers), 5.2)
    figure = Figure(figsize=size, layout='constrained')
    axes = figure.subplots(2, len(routers), squeeze=False, sharex='col', sharey='row')
    for (quantity, title), pair in zip(quantities.items(), axes):
      for router, axis in zip(routers, pair):
        for i, row in enumerate(rows):
          values_L = _mean(row['routing'].get(router), quantity)
          if values_L is not None:
            axis.plot(
              np.arange(1, len(values_L) + 1),
              values_L,
              color=figures.COLOURS[i % len(figures.COLOURS)],
              marker=MARKS[i % len(MARKS)],
              markersize=4,
              clip_on=False,
              label=row['label'],
            )
        axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
      pair[0].set_ylabel(title)
      pair[0].set_ylim(bottom=0)  # of both, when all lines are there
    for router, axis in zip(routers, axes[0]):
      axis.set_title(ROUTERS[router])
    for axis in axes[1]:
      axis.set_xlabel('layer')
    handles = {}
    for axis in axes.flat:
      handles |= {line.get_label(): line for line in axis.get_lines()}
    labels = [row['label'] for row in rows]
    figure.legend(
      [handles[label] for label in labels],
      labels,
      loc='outside lower center',
      ncols=min(3, len(labels)),
    )
    # Without the library's version in the file, the same numbers give the same bytes.
    figure.savefig(path, metadata={'Software': None})


def _mean(by_domain: Mapping[str, Any] | None, quantity: str) -> np.ndarray | None:
  """Over the domains that have it, by layer."""
  values = [facts[quantity] for facts in (by_domain or {}).values() if facts[quantity] is not None]
  return np.mean(values, axis=0) if values else None
