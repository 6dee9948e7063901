"""Prints the runs of a recipe in the order of training: name, kind, and the runs it starts from.

    python launch/lib/graph.py --config=configs/quickstart.py

One line a run, tabs between the three, commas between the last. For launch/recipe, which must not
know the graph a second time.
"""

import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bam_jax import cli, config
from bam_jax.recipes import graph

_CONFIG = cli.define_recipe()


def main() -> None:
  """Resolves the recipe, which also checks it whole."""
  jax.config.update('jax_platforms', 'cpu')
  for name, node in graph.resolve(cli.read_recipe(_CONFIG)).items():
    print(name, node.kind, ','.join(config.parents(node.run)), sep='\t')


if __name__ == '__main__':
  cli.run(main)
