"""Pictures of where routers send tokens, and the style of all pictures.

Legend: L layers, E experts.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK = '#2b2f36'
SHARES = ['#fbfbf9', '#cfe3ee', '#7fb4d6', '#2a7fb5', '#083d66']  # from none to all of the tokens
ROUTERS = {'attention': 'Attention router: mean gate', 'ffn': 'FFN router: share of the tokens'}


def style() -> contextlib.AbstractContextManager:
  """The style of all pictures, for the figures made and saved inside."""
  return matplotlib.style.context('bam_jax.reports.pictures')


def routing(path: Path, row: Mapping[str, Any]) -> None:
  """Draws a heat map of domains and experts for each router and layer of a mixture.

  `row` has `routing`, router -> domain -> load [L][E], and `experts`, E names.
  """
  loads = {
    router: np.stack([np.asarray(load) for load in by_domain.values()])
    for router, by_domain in row['routing'].items()
  }
  with style():
    num_domains, num_layers, num_experts = next(iter(loads.values())).shape
    columns = min(num_layers, 4 if len(loads) == 1 else 2)
    lines, cell = math.ceil(num_layers / columns), 0.42
    width = len(loads) * (1.0 + columns * (num_experts * cell + 0.25)) + 0.6
    height = 1.25 + lines * (num_domains * cell + 0.32)
    figure = Figure(figsize=(width, height), layout='constrained')
    figure.suptitle(f'{row["label"]}: where each domain goes', x=0.01, ha='left', weight='bold')
    parts = figure.subfigures(1, len(loads), squeeze=False)[0]
    for part, (router, load) in zip(parts, loads.items()):
      part.suptitle(ROUTERS[router], fontsize=9)
      grid = part.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
      for layer, axis in enumerate(grid.flat):
        if layer >= num_layers:
          axis.set_axis_off()
          continue
        _heat_map(axis, load[:, layer], row['experts'], list(row['routing'][router]))
        axis.set_title(f'layer {layer + 1}', fontsize=8, weight='normal')
      for axis in grid[-1]:
        axis.tick_params(axis='x', rotation=90 if num_experts > 4 else 0)
      part.supxlabel('expert', fontsize=8)
      part.supylabel('domain', fontsize=8)
    save(figure, path)


def _heat_map(axis: Axes, load: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> None:
  shades = LinearSegmentedColormap.from_list('share', SHARES)
  axis.grid(False)
  axis.spines[:].set_visible(False)
  axis.pcolormesh(load, cmap=shades, vmin=0.0, vmax=1.0, edgecolors='white', linewidth=1.5)
  for (i, j), share in np.ndenumerate(load):
    look = dict(ha='center', va='center', color='white' if share > 0.55 else INK, fontsize=6.5)
    axis.text(j + 0.5, i + 0.5, f'{share:.2f}', **look)
  axis.set_xticks(np.arange(len(columns)) + 0.5, columns)
  axis.set_yticks(np.arange(len(rows)) + 0.5, rows)
  axis.set_ylim(len(rows), 0)  # the first row on top


def save(figure: Figure, path: Path) -> None:
  """Writes a picture."""
  # Without the library's version in the file, the same numbers give the same bytes.
  figure.savefig(path, metadata={'Software': None})
