"""Perplexity and bits per byte: computed from likelihoods, and as text."""

import math

# Nats per token of a model that diverged, above which a float cannot hold the perplexity, nor JSON
# an infinity; with room for sums. Such a perplexity is given as exp(MAX_NATS), 5e299.
MAX_NATS = 690.0


def perplexity(nats_per_token: float) -> float:
  """The exponential, kept finite."""
  return math.exp(min(nats_per_token, MAX_NATS))


def number(value: float) -> str:
  """A perplexity, with as many decimals as matter."""
  if value >= 1e9:
    return '>1e299' if value > 1e299 else f'{value:.1e}'
  return f'{value:.2f}' if value < 1000 else f'{value:,.0f}'
