"""Perplexities and their relative changes: of one run, of several seeds, and of the paper."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.reproduction import paper
from tools.reproduction.facts import Run

DOMAINS = ('general', 'code', 'law', 'math')
AVERAGE = 'average'
COLUMNS = (*DOMAINS, AVERAGE)

Seeds = Sequence[Mapping[str, Any]]  # facts of each seed


@dataclass(frozen=True)
class Spread:
  """One number a seed, at least one of them."""

  values: tuple[float, ...]

  @property
  def mean(self) -> float:
    return sum(self.values) / len(self.values)

  @property
  def low(self) -> float:
    return min(self.values)

  @property
  def high(self) -> float:
    return max(self.values)


def spread(values: Sequence[float | None]) -> Spread | None:
  """Of the seeds that have the number; None when none has."""
  there = tuple(value for value in values if value is not None)
  return Spread(there) if there else None


def perplexity(run: Run | None, column: str) -> float | None:
  """exp of the held-out loss per token; the average is the arithmetic mean of the perplexities.

  None where the run is missing, or a domain of it.
  """
  if run is None:
    return None
  if column == AVERAGE:
    return _average(perplexity(run, domain) for domain in DOMAINS)
  score = run['domains'].get(column)
  return math.exp(score['nll'] / score['tokens']) if score and score['tokens'] else None


def perplexities(seeds: Seeds, name: str, column: str) -> Spread | None:
  """A run's perplexity by seed."""
  return spread([perplexity(seed['runs'].get(name), column) for seed in seeds])


def changes(seeds: Seeds, name: str, base: str, column: str) -> Spread | None:
  """A run's relative change from another's perplexity, each within one seed."""
  pairs = [
    (perplexity(seed['runs'].get(name), column), perplexity(seed['runs'].get(base), column))
    for seed in seeds
  ]
  return spread([_change(value, against) for value, against in pairs])


def paper_change(name: str, base: str, column: str) -> float | None:
  """The paper's relative change by its table 1; None where it printed no such numbers."""
  value, against = (_paper_perplexity(run, column) for run in (name, base))
  return _change(value, against)


def paper_routing_change(name: str, column: str) -> float | None:
  """The paper's relative change from BTX by its table 6, which has averages only."""
  if column != AVERAGE:
    return None
  return _change(paper.AVERAGE_BY_ROUTING.get(name), paper.AVERAGE_BY_ROUTING['btx'])


def _paper_perplexity(name: str, column: str) -> float | None:
  printed = paper.PERPLEXITY.get(name, {})
  if column == AVERAGE:
    return _average(printed.get(domain) for domain in DOMAINS)
  return printed.get(column)


def _change(value: float | None, against: float | None) -> float | None:
  return None if value is None or against is None else value / against - 1


def _average(values: Any) -> float | None:
  values = list(values)
  return None if None in values else sum(values) / len(values)
