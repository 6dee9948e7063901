"""`bam_jax.main` with a fault on the way to the device: STEPS, FIRST, then the flags of main.

In the batches of STEPS, joined by commas, some weights are no numbers; FIRST steps are done before.
"""

import itertools
import sys

import numpy as np

from bam_jax import cli, main
from bam_jax.data import mixture

model_inputs = mixture.model_inputs


def poisoned(batch: mixture.Batch) -> mixture.Batch:
  batch = model_inputs(batch)
  if next(counted) in STEPS:
    batch['weights'] = np.where(batch['tokens'] == batch['tokens'][0, 0], np.nan, batch['weights'])
  return batch


if __name__ == '__main__':
  STEPS = set(map(int, sys.argv.pop(1).split(',')))
  counted = itertools.count(int(sys.argv.pop(1)) + 1)
  mixture.model_inputs = poisoned
  cli.run(main.main)
