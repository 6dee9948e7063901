"""`bam_jax.main`, writing down what it trains on: FILE, then the flags of main.

A line of FILE for every batch that a step took: the rows of this process.
"""

import json
import sys

from bam_jax import cli, main
from bam_jax.data import mixture

model_inputs = mixture.model_inputs


def recorded(batch: mixture.Batch) -> mixture.Batch:
  with open(FILE, 'a') as file:
    file.write(json.dumps([batch['tokens'].tolist(), batch['domains'].tolist()]) + '\n')
  return model_inputs(batch)


if __name__ == '__main__':
  FILE = sys.argv.pop(1)
  mixture.model_inputs = recorded
  cli.run(main.main)
