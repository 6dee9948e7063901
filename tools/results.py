"""The pages of results: runs to small files, and these to tables and pictures.

    python -m tools.results collect --workdir=0=runs/r_0 --workdir=1=runs/r_1 --workdir=2=runs/r_2
    python -m tools.results draw

Subcommands:
  collect   what finished runs say, a file for each seed, into docs/results/
  draw      the tables and pictures of docs/results.md and its appendix, from those files alone

`python -m tools.results SUBCOMMAND --help` lists its flags.
"""

from bam_jax import cli

SUBCOMMANDS = {'collect': 'tools.reproduction.collect', 'draw': 'tools.reproduction.draw'}

if __name__ == '__main__':
  cli.run_subcommands(SUBCOMMANDS)
