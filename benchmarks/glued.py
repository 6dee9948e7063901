"""What routers that read the document so far make of text that changes its domain.

    python -m benchmarks.glued --data=runs/quickstart/data --checkpoint=runs/quickstart/btx \
      --checkpoint=runs/quickstart/bam_top1

Held-out windows of one document each are cut in halves. A second half is scored behind its own
first half, and behind one of another domain, as one document: any model loses the context, and
routers that read a mean over the document also have the wrong mean. Average perplexity of second
halves over the domains. `--json` writes `rows`: `checkpoint`, `own`, `other`, and their ratio
`over`.
"""

import math
from typing import Any

import jax
import numpy as np

from bam_jax import cli
from bam_jax.data import mixture, store
from bam_jax.errors import UserError
from bam_jax.train import loss
from benchmarks import loading

ROWS = 64  # windows of each domain


def main() -> dict[str, Any]:
  """Scores both, and prints a table."""
  (paths, dataset), rows = loading.given(), []
  for path in paths:
    meta, network, params = loading.load(path)
    score = jax.jit(lambda params, batch, network=network: loss.nll(network, params, batch))
    windows = [_windows(dataset, domain, meta.sequence_length) for domain in dataset.domains]
    own = [_perplexity(score(params, _halves(one, one))) for one in windows]
    other = [
      _perplexity(score(params, _halves(before, one)))
      for one in windows
      for before in windows
      if before is not one
    ]
    facts = {'own': sum(own) / len(own), 'other': sum(other) / len(other)}
    rows.append({'checkpoint': path, **facts, 'over': facts['other'] / facts['own']})
  shown = [
    (row['checkpoint'], *(f'{row[key]:.3g}' for key in ('own', 'other', 'over'))) for row in rows
  ]
  columns = 'behind its own half', "behind another domain's", 'ratio'
  cli.console().print(cli.table('Second halves', ['checkpoint'], columns, shown))
  return {'rows': rows}


def _windows(dataset: store.Dataset, domain: str, length: int) -> mixture.Batch:
  """ROWS held-out windows that one document fills."""
  found: dict[str, list[np.ndarray]] = {}
  for batch in mixture.heldout(dataset.documents(domain, 'valid'), length, ROWS):
    whole = (batch['segments'] == 1).all(1) & (batch['weights'] == 1).all(1)
    for key, x in batch.items():
      found.setdefault(key, []).extend(x[whole])
    if len(found['tokens']) >= ROWS:
      break
  if not found['tokens']:
    raise UserError(f'{dataset.path} has no held-out document of {length} tokens in {domain}.')
  return {key: np.stack(rows[:ROWS]) for key, rows in found.items()}


def _halves(before: mixture.Batch, after: mixture.Batch) -> mixture.Batch:
  """Rows of a first half of one window and the second of another, which alone is scored."""
  count, half = min(len(before['tokens']), len(after['tokens'])), after['tokens'].shape[1] // 2
  glued = {key: x[:count].copy() for key, x in after.items()}
  glued['tokens'][:, :half] = before['tokens'][:count, :half]
  glued['positions'][:] = np.arange(2 * half)
  glued['weights'][:, :half] = 0
  return glued


def _perplexity(metrics: loss.Metrics) -> float:
  return math.exp(float(metrics.nll) / int(metrics.targets))


if __name__ == '__main__':
  cli.run(main)
