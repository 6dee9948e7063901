"""Held-out likelihood by domain, and where the routers send each domain."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from bam_jax import config
from bam_jax.data import mixture, shards
from bam_jax.model import transformer
from bam_jax.parallel import processes, sharding
from bam_jax.train import log
from bam_jax.train import step as step_lib


def evaluate(
  model: config.Model,
  run: config.Run,
  recipe: config.Recipe,
  params: transformer.Params,
  dataset: shards.Dataset,
  domains: Iterable[str],
  tokens: int | None,
  between: Callable[[], None],
) -> dict[str, dict[str, Any]]:
  """Negative log-likelihood of the held-out documents of domains, packed and cut into sequences.

  It reads `tokens` of each domain, rounded up to whole batches, or everything (None), and calls
  `between` after every batch, in every process as often.

  Returns:
    For each domain `nll` (a sum, nats), `tokens` and `bytes` that it is over, the latter scaled to
    the tokens read, and the `routing` of each router.
  """
  mesh = sharding.make_mesh(run.mesh)
  step = step_lib.evaluation_step(model, run.compute, mesh)
  part, parts = processes.share_of_batch(mesh)
  length, batch_size = recipe.data.sequence_length, recipe.evaluation.batch_size
  num_batches = None if tokens is None else -(-tokens // (batch_size * length))
  results = {}
  for domain in domains:
    documents = dataset.documents(domain, 'valid')
    batches = mixture.heldout(
      documents, sequence_length=length, batch_size=batch_size, process_index=part,
      process_count=parts,
    )  # fmt: skip
    total = None
    for batch in itertools.islice(batches, num_batches):
      sums = jax.device_get(step(params, sharding.put_batch(batch, mesh)))
      # Float32 holds the sum of a device's rows to rounding; many of them need float64, and one
      # order of adding them, so that the result is the same over any number of processes.
      sums = jax.tree.map(lambda x: np.asarray(x, np.float64).sum(0), sums)
      total = sums if total is None else jax.tree.map(np.add, total, sums)
      between()
    targets = documents.num_tokens - len(documents)
    results[domain] = {
      'nll': float(total.nll),
      'tokens': int(total.targets),
      'bytes': int(documents.byte_counts.sum()) * int(total.targets) / targets,
      'routing': log.of_routers(total.routing),
    }
  return results
