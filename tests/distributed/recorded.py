"""`bam_jax.main`, writing down what it trains on: FILE, then the flags of main.

A line of FILE for every batch that a step took: the tokens of this process.
"""

import json
import sys

from bam_jax import cli, main
from bam_jax.data import mixture

iterate = mixture.iterate


class Recorded:
  """An iterator over batches that writes each one down."""

  def __init__(self, *arguments, **options):
    self._batches = iterate(*arguments, **options)
    self.get_state, self.set_state = self._batches.get_state, self._batches.set_state

  def __next__(self) -> mixture.Batch:
    batch = next(self._batches)
    with open(FILE, 'a') as file:
      file.write(json.dumps([batch['tokens'].tolist()]) + '\n')
    return batch


if __name__ == '__main__':
  FILE = sys.argv.pop(1)
  mixture.iterate = Recorded
  cli.run(main.main)
