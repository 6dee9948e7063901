"""How unevenly a mixture's experts are loaded when devices share the experts of a few sequences.

    python -m benchmarks.skew --data=runs/quickstart/data --checkpoint=runs/quickstart/btx \
      --checkpoint=runs/quickstart/bam_top1

Along `expert` a group of devices, one expert on each, works on the rows of its own part of a batch,
and waits for the fullest. For groups of some rows of training data, with all domains in equal
shares and with one domain alone: the load of the fullest FFN expert over an even one, on average
over layers and groups, which is what a dropless FFN costs; and the share of assignments that a
capacity factor of 1.25 or 2 drops.

`--json` writes `rows`: for each checkpoint, data and number of rows `checkpoint`, `domains` ('all'
or 'one'), `rows_of_a_group`, `fullest`, `dropped_1.25`, `dropped_2`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bam_jax import cli
from bam_jax.data import mixture, store
from bam_jax.errors import UserError
from benchmarks import loading

GROUPS = 4, 8, 16, 32, 64  # rows
ROWS = 256
CAPACITIES = 1.25, 2.0


def main() -> dict[str, Any]:
  """Routes the rows, and prints a table."""
  (paths, dataset), rows = loading.given(), []
  for path in paths:
    mixed, apart = [dataset.domains], [(domain,) for domain in dataset.domains]
    for name, kinds in (('all', mixed), ('one', apart)):
      load_KRLE = _loads(path, dataset, kinds)
      for size in GROUPS:
        load_GLE = load_KRLE.reshape(-1, size, *load_KRLE.shape[2:]).sum(1)
        even_GL1 = load_GLE.mean(-1, keepdims=True)
        facts = {'fullest': float((load_GLE.max(-1, keepdims=True) / even_GL1).mean())}
        for factor in CAPACITIES:
          over = np.maximum(load_GLE - factor * even_GL1, 0).sum() / load_GLE.sum()
          facts[f'dropped_{factor:g}'] = float(over)
        rows.append({'checkpoint': path, 'domains': name, 'rows_of_a_group': size, **facts})
  shown = [
    (row['checkpoint'], row['domains'], str(row['rows_of_a_group']), f'{row["fullest"]:.2f}',
     *(f'{row[f"dropped_{factor:g}"]:.1%}' for factor in CAPACITIES))
    for row in rows
  ]  # fmt: skip
  columns = (
    'domains',
    'rows',
    'fullest over even',
    *(f'dropped at {factor:g}' for factor in CAPACITIES),
  )
  cli.console().print(cli.table('FFN experts of a group', ['checkpoint'], columns, shown))
  return {'rows': rows}


def _loads(path: str, dataset: store.Dataset, kinds: Sequence[Sequence[str]]) -> np.ndarray:
  """Assignments to each FFN expert, of every row of each kind of batch and layer: KRLE."""
  meta, network, params = loading.load(path)
  if not meta.model.ffn_experts:
    raise UserError(f'--checkpoint={path} is a dense model: name a mixture.')
  how = dict(sequence_length=meta.sequence_length, batch_size=ROWS // len(kinds), seed=0)
  hidden = jax.jit(lambda *arrays: network.hidden(*arrays)[1].ffn.load)
  loads = []
  for domains in kinds:
    documents = {domain: dataset.documents(domain, 'train') for domain in domains}
    batch = mixture.batches(documents, dict.fromkeys(documents, 1.0), **how)[0]
    arrays = [batch[key] for key in ('tokens', 'segments', 'positions')]
    rows = (hidden(params, *(x[row : row + 1] for x in arrays)) for row in range(len(arrays[0])))
    loads.append(np.stack([np.asarray(load) for load in rows]))
  return np.stack(loads)


if __name__ == '__main__':
  cli.run(main)
