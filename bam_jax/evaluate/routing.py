"""Where routers send tokens: sums by domain, and a few documents token by token.

A token counts once: in the window in which the token after it is scored. So BOS counts, and EOS,
from which nothing is predicted, does not.

Legend: L layers, T tokens, E experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import special

from bam_jax import checkpoint
from bam_jax.evaluate.scorer import Routed

SHOWN = 2  # documents of each domain that are kept token by token,
SHOWN_TOKENS = 320  # and so many tokens of each


class Record:
  """What the routers of one checkpoint did with one domain."""

  def __init__(self):
    self.tokens = 0
    self._kept: dict[int, dict[int, Mapping[str, Routed]]] = {}  # document -> window -> routing
    self._sums: dict[str, dict[str, np.ndarray]] = {}

  def add(self, document: int, window: int, routing: Mapping[str, Routed]) -> None:
    """Counts the scored tokens of a window; keeps those of the first documents.

    Numbers of windows grow within a document; windows may come in any order.
    """
    for name, routed in routing.items():
      gate_LTE = routed.gate_LTE.astype(np.float64)
      new = {
        'gate': gate_LTE.sum(1),
        'load': routed.load_LTE.sum(1, dtype=np.float64),
        'entropy': special.entr(gate_LTE).sum((1, 2)),
      }
      sums = self._sums.get(name, {})
      self._sums[name] = {key: sums.get(key, 0.0) + value for key, value in new.items()}
    self.tokens += next(iter(routing.values())).gate_LTE.shape[1] if routing else 0
    if document < SHOWN:
      self._kept.setdefault(document, {})[window] = routing

  def shown(self, document: int) -> dict[str, Routed]:
    """By router, what it did with the first tokens of one of the first documents."""
    parts = [routing for _, routing in sorted(self._kept[document].items())]
    return jax.tree.map(lambda *x: np.concatenate(x, axis=1)[:, :SHOWN_TOKENS], *parts)

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
