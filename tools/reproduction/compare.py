"""Perplexities and their relative changes: of one run, of several seeds, and of the paper."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.reproduction.facts import Run
from tools.reproduction.recipe import paper as recipes

AVERAGE = 'average'
COLUMNS = (*recipes.DOMAINS, AVERAGE)

Seeds = Sequence[Mapping[str, Any]]  # facts of each seed
Printed = Mapping[str, Mapping[str, float]]  # perplexities of the paper, by run and domain


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
    return _average(perplexity(run, domain) for domain in recipes.DOMAINS)
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


def printed_change(table: Printed, name: str, base: str, column: str) -> float | None:
  """A table's relative change; None where the paper printed no such numbers."""

  def value(run: str) -> float | None:
    domains = table.get(run, {})
    return (
      _average(domains.get(domain) for domain in recipes.DOMAINS)
      if column == AVERAGE
      else domains.get(column)
    )

  return _change(value(name), value(base))


def alike(seeds: Seeds, names: Iterable[str]) -> Seeds:
  """The seeds with the most of some runs, all the same, so that a table's rows are comparable."""
  finished = [frozenset(names) & seed['runs'].keys() for seed in seeds]
  most = max(finished, key=len, default=frozenset())
  return [seed for seed, runs in zip(seeds, finished) if most <= runs]


def _change(value: float | None, against: float | None) -> float | None:
  return None if value is None or against is None else value / against - 1


def _average(values: Any) -> float | None:
  values = list(values)
  return None if None in values else sum(values) / len(values)
