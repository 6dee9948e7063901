"""`bam_jax.main` with a fault in its data: STEPS, then the flags of main.

In the batches of STEPS, joined by commas, some weights are NaN.
"""

import sys

import numpy as np

from bam_jax import cli, main
from bam_jax.data import mixture

iterate = mixture.iterate


def poisoned(batches, *arguments, **options):
  return iterate(batches.map_with_index(poison), *arguments, **options)


def poison(number: int, batch: mixture.Batch) -> mixture.Batch:
  if number + 1 in STEPS:
    wrong = batch['tokens'] == batch['tokens'][0, 0]
    batch = batch | {'weights': np.where(wrong, np.nan, batch['weights'])}
  return batch


if __name__ == '__main__':
  STEPS = set(map(int, sys.argv.pop(1).split(',')))
  mixture.iterate = poisoned
  cli.run(main.main)
