"""Where routers send tokens: sums by domain, and the pictures of them.

A token counts where the token after it is scored: BOS does, and EOS does not.

Legend: L layers, T tokens, E experts.
"""

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from bam_jax import checkpoint
from bam_jax.evaluate.scorer import Routed
from bam_jax.reports import figures


class Record:
  """What the routers of one checkpoint did with one domain."""

  def __init__(self):
    self.tokens = 0
    self._sums = collections.defaultdict(lambda: collections.defaultdict(float))  # by router

  def add(self, routing: Mapping[str, Routed]) -> None:
    """Counts the scored tokens of a window."""
    for name, routed in routing.items():
      gate_LTE, sums = routed.gate_LTE.astype(np.float64), self._sums[name]
      sums['gate'] += gate_LTE.sum(1)
      sums['load'] += routed.load_LTE.sum(1, dtype=np.float64)
      sums['entropy'] += special.entr(gate_LTE).sum((1, 2))
    self.tokens += next(iter(routing.values())).gate_LTE.shape[1] if routing else 0

  def facts(self, domain: str, experts: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """By router and layer, means over the tokens: see `python -m bam_jax.evaluate --help`."""
    made = {}
    for router, sums in self._sums.items():
      means = {name: value / self.tokens for name, value in sums.items()}
      own = [number for number, name in enumerate(experts[router]) if name == domain]
      made[router] = {name: value.tolist() for name, value in means.items()}
      made[router]['own_share'] = means['load'][:, own].sum(1).tolist() if own else None
    return made


def expert_names(meta: checkpoint.Meta) -> dict[str, list[str]]:
  """By router, the sources of its experts, in order; numbers where they are not known."""
  sections = {'attention': meta.model.attention_experts, 'ffn': meta.model.ffn_experts}
  counts = {router: section.num_experts for router, section in sections.items() if section}
  names = {len(meta.sources): list(meta.sources)}
  return {router: names.get(n, [str(i) for i in range(n)]) for router, n in counts.items()}


def own_shares(facts: Mapping[str, Any]) -> list[list[str]]:
  """Rows of label, router, and by domain its `own_share`: the mean over the layers, in percent."""
  text = lambda layers: '–' if layers is None else f'{100 * sum(layers) / len(layers):.0f}%'
  return [
    [row['label'], router, *(text(by_domain[name]['own_share']) for name in facts['domains'])]
    for row in facts['rows']
    for router, by_domain in (row['routing'] or {}).items()
  ]


def draw(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Draws `<row's number>_<router>.png` of the rows of `--json`."""
  for number, row in enumerate(rows):
    for router, by_domain in (row['routing'] or {}).items():
      loads = {domain: facts['load'] for domain, facts in by_domain.items()}
      shown = row | {'experts': row['experts'][router], 'routing': {router: loads}}
      figures.routing(folder / f'{number}_{router}.png', shown)
