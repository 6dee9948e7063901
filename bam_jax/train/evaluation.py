"""Held-out likelihood by domain, and where the routers send each domain."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from bam_jax import config
from bam_jax.data import mixture, shards
from bam_jax.model import transformer
from bam_jax.parallel import processes, sharding
from bam_jax.train import loss, metrics


def heldout_nll(
  evaluate: Callable,
  params: transformer.Params,
  dataset: shards.Dataset,
  domains: Iterable[str],
  options: config.Evaluation,
  sequence_length: int,
  mesh: jax.sharding.Mesh,
  tokens: int | None,
  between: Callable[[], None],
) -> dict[str, Any]:
  """Negative log-likelihood of each domain's held-out documents.

  Args:
    evaluate: what `step.evaluation_step` makes.
    params: of the model.
    dataset: has a `valid` split of every domain.
    domains: which.
    options: the batch size.
    sequence_length: T; documents are packed and cut at it.
    mesh: where to run.
    tokens: how much of each domain to read, rounded up to whole batches; None is all.
    between: called after every batch, by every process as often.

  Returns:
    For each domain: `nll` (a sum, nats), `tokens` and `bytes` that it is over, and the `routing`
    of each router. `bytes` is scaled to the tokens read.
  """
  return {
    domain: _domain(
      evaluate,
      params,
      dataset.documents(domain, 'valid'),
      options.batch_size,
      sequence_length,
      mesh,
      tokens,
      between,
    )
    for domain in domains
  }


def _domain(evaluate, params, documents, batch_size, sequence_length, mesh, tokens, between):
  part, parts = processes.share_of_batch(mesh)
  batches = mixture.heldout(
    documents,
    sequence_length=sequence_length,
    batch_size=batch_size,
    process_index=part,
    process_count=parts,
  )
  if tokens is not None:
    batches = itertools.islice(batches, -(-tokens // (batch_size * sequence_length)))
  total: loss.Metrics | None = None
  for batch in batches:
    sums = jax.device_get(evaluate(params, sharding.put_batch(batch, mesh)))
    # Float32 holds the sum of a device's rows to rounding; many of them need float64, and one order
    # of adding them, so that the result is the same over any number of processes.
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64).sum(0), sums)
    total = sums if total is None else jax.tree.map(np.add, total, sums)
    between()
  pairs = documents.num_tokens - len(documents)
  return {
    'nll': float(total.nll),
    'tokens': int(total.targets),
    'bytes': int(documents.byte_counts.sum()) * int(total.targets) / pairs,
    'routing': {name: metrics.of_router(s) for name, s in metrics.named_routers(total.routing)},
  }


def nats_per_token(domains: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
  """Mean negative log-likelihood of each domain."""
  return {name: facts['nll'] / facts['tokens'] for name, facts in domains.items()}
