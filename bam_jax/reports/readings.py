"""What a report's numbers say, in sentences that the numbers choose."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SAME = 0.0005  # relative differences below this are printed as 0.0%: no difference
# Nats per token of a model that diverged, past which a float cannot hold the perplexity, nor JSON
# what comes instead; with room for sums. Such a perplexity is given as exp(MOST_NATS), 5e299.
MOST_NATS = 690.0


def compute(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Reads the comparisons that the paper makes off the rows of a report.

  Args:
    rows: the report's finished runs. A specialist's own domain is the one of its name.

  Returns:
    Objects with `claim`, `holds` (a bool), `sentence`, and the numbers behind it. The claims, each
    only where there are runs to compare:
      specialists_beat_seed: each one on its own domain.
      mixture_beats_seed: one a mixture, on every domain.
      bam_beats_btx: one a pair, by average perplexity, as the paper has it.
      experts_serve_own_domain: one a mixture, the share of a domain's tokens that the FFN router
        sends to the expert of the domain's name, the mean over the layers.
  """
  seed = next((row for row in rows if row['kind'] == 'seed'), None)
  mixtures = [row for row in rows if row['kind'] == 'mixture']
  readings = []
  if seed:
    readings.append(_specialists(rows, seed))
    readings += [_mixture(row, seed) for row in mixtures]
  bams = [row for row in mixtures if str(row['method']).startswith('bam')]
  btxs = [row for row in mixtures if row['method'] == 'btx']
  readings += [_bam_btx(bam, btx) for bam in bams for btx in btxs]
  readings += [_experts(row) for row in mixtures]
  return [reading for reading in readings if reading]


def perplexity(nats: float) -> float:
  """Of so many nats per token, and finite."""
  return math.exp(min(nats, MOST_NATS))


def number(value: float) -> str:
  """A perplexity, with as many decimals as matter."""
  if value >= 1e9:
    return '>1e299' if value > 1e299 else f'{value:.1e}'
  return f'{value:.2f}' if value < 1000 else f'{value:,.0f}'


def percent(change: float, decimals: int) -> str:
  """A relative change, with its sign: +0.2%, −57.0%."""
  form = f'+.{decimals}f' if change < 1e6 else '+.1e'
  return f'{100 * change:{form}}%'.replace('-', '−')


def _compare(row: Mapping[str, Any], base: Mapping[str, Any], domain: str) -> dict[str, Any]:
  value, against = row['perplexity'][domain], base['perplexity'][domain]
  return {
    'run': row['run'],
    'domain': domain,
    'perplexity': value,
    'against': base['run'],
    'against_perplexity': against,
    'relative_change': value / against - 1,
  }


def _specialists(
  rows: Sequence[Mapping[str, Any]], seed: Mapping[str, Any]
) -> dict[str, Any] | None:
  comparisons = [
    _compare(row, seed, row['run'])
    for row in rows
    if row['kind'] == 'specialist' and row['run'] in row['perplexity'].keys() & seed['perplexity']
  ]
  if not comparisons:
    return None
  wins = sum(c['relative_change'] < 0 for c in comparisons)
  if wins == len(comparisons):
    opening = 'Every specialist beats the seed on its own domain'
  elif wins == 0:
    opening = 'No specialist beats the seed on its own domain'
  else:
    verb = 'beats the seed on its own domain' if wins == 1 else 'beat the seed on their own domain'
    opening = f'{wins} of {len(comparisons)} specialists {verb}'
  return {
    'claim': 'specialists_beat_seed',
    'holds': wins == len(comparisons),
    'sentence': f'{opening}: {_say(comparisons)}.',
    'comparisons': comparisons,
  }


def _mixture(row: Mapping[str, Any], seed: Mapping[str, Any]) -> dict[str, Any] | None:
  comparisons = [_compare(row, seed, d) for d in row['perplexity'] if d in seed['perplexity']]
  if not comparisons:
    return None
  losses = [c for c in comparisons if c['relative_change'] >= 0]
  wins = len(comparisons) - len(losses)
  if not losses:
    sentence = f'{row["label"]} beats the seed on every domain.'
  elif wins == 0:
    sentence = f'{row["label"]} beats the seed on no domain: {_say(losses)}.'
  else:
    sentence = (
      f'{row["label"]} beats the seed on {wins} of {len(comparisons)} domains, but not on'
      f' {_say(losses)}.'
    )
  return {
    'claim': 'mixture_beats_seed',
    'run': row['run'],
    'holds': not losses,
    'sentence': sentence,
    'comparisons': comparisons,
  }


def _bam_btx(bam: Mapping[str, Any], btx: Mapping[str, Any]) -> dict[str, Any] | None:
  value, against = bam['average_perplexity'], btx['average_perplexity']
  if value is None or against is None:
    return None
  change = value / against - 1
  cost = bam['training_flops'] / btx['training_flops']
  if abs(change) < SAME:
    relation = f'the same average perplexity as {btx["label"]}'
  else:
    relation = (
      f'an average perplexity {percent(abs(change), 1)[1:]} {"lower" if change < 0 else "higher"}'
      f' than {btx["label"]}'
    )
  sentence = (
    f'{bam["label"]} has {relation} ({number(value)} against {number(against)}), for {cost:.2f}'
    ' times the training FLOPs.'
  )
  # The mean perplexity weighs the hardest domain most; the mean of the losses may disagree.
  bits, against_bits = bam['average_bits_per_byte'], btx['average_bits_per_byte']
  if abs(change) >= SAME and (bits - against_bits) * change < 0:
    sentence += (
      f' By average bits per byte it is the other way round ({bits:.3f} against'
      f' {against_bits:.3f}).'
    )
  return {
    'claim': 'bam_beats_btx',
    'run': bam['run'],
    'against': btx['run'],
    'holds': change <= -SAME,
    'sentence': sentence,
    'relative_change': change,
    'training_flops_ratio': cost,
  }


def _experts(row: Mapping[str, Any]) -> dict[str, Any] | None:
  experts, shares, even_split = row['experts'], {}, None
  for domain, load in row['routing'].get('ffn', {}).items():
    if experts.count(domain) == 1:
      total = sum(map(sum, load))
      shares[domain] = sum(layer[experts.index(domain)] for layer in load) / len(load)
      even_split = total / len(load) / len(experts)  # k / E of a top-k router
  if not shares:
    return None
  said = _join(f'{100 * share:.0f}% of {domain}' for domain, share in shares.items())
  return {
    'claim': 'experts_serve_own_domain',
    'run': row['run'],
    'holds': all(share > even_split for share in shares.values()),
    'sentence': (
      f'The FFN router of {row["label"]} sends {said} to the expert of that name; an even split'
      f' would send {100 * even_split:.0f}%.'
    ),
    'shares': shares,
    'even_split': even_split,
  }


def _say(comparisons: Sequence[Mapping[str, Any]]) -> str:
  return _join(
    f'{c["domain"]} ({number(c["perplexity"])} against {number(c["against_perplexity"])},'
    f' {percent(c["relative_change"], 1)})'
    for c in comparisons
  )


def _join(phrases: Iterable[str]) -> str:
  *most, last = phrases
  return f'{", ".join(most)} and {last}' if most else last
