"""Held-out likelihood by domain, and where the routers send each domain."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bam_jax.data import mixture
from bam_jax.model import transformer
from bam_jax.parallel import processes, sharding
from bam_jax.train import log
from bam_jax.train import step as step_lib
from bam_jax.train.job import Job


def evaluate(
  job: Job, params: transformer.Params, tokens: int | None, between: Callable[[], None]
) -> dict[str, dict[str, Any]]:
  """Negative log-likelihood of the job's held-out documents, packed and cut into sequences.

  It reads `tokens` of each domain, rounded up to whole batches, or everything (None), and calls
  `between` after every batch, in every process as often. For each domain it returns `nll` (a sum,
  nats), `tokens` and `bytes` that it is over, the latter scaled to the tokens read, and `routing`.
  """
  mesh = sharding.make_mesh(job.run.mesh)
  step = step_lib.evaluation_step(job.model, job.run.compute, mesh)
  share = processes.share_of_batch(mesh)
  length, batch_size = job.recipe.data.sequence_length, job.recipe.evaluation.batch_size
  num_batches = None if tokens is None else -(-tokens // (batch_size * length))
  results = {}
  for domain in job.domains:
    documents = job.dataset.documents(domain, 'valid')
    batches, total = mixture.heldout(documents, length, batch_size, share), None
    for batch in itertools.islice(batches, num_batches):
      sums = jax.device_get(step(params, sharding.put_batch(batch, mesh)))
      # Float32 holds the sum of a device's rows to rounding; many of them need float64, and one
      # order of adding them, so that the result is the same over any number of processes.
      sums = jax.tree.map(lambda x: np.asarray(x, np.float64).sum(0), sums)
      total = sums if total is None else jax.tree.map(np.add, total, sums)
      between()
    tokens_read, targets = int(total.targets), documents.num_tokens - documents.num_documents
    results[domain] = {
      'nll': float(total.nll),
      'tokens': tokens_read,
      'bytes': documents.num_bytes * tokens_read / targets,
      'routing': log.of_routers(total.routing),
    }
  return results
