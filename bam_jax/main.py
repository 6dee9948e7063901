"""Trains the runs of a recipe, in order, from where they stopped, and writes the report.

    python -m bam_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
    python -m bam_jax.main --config=configs/quickstart.py --workdir=runs/quickstart --runs=seed,code
    python -m bam_jax.main --config=... --workdir=... --config.runs.seed.tokens=1000000

Finished runs are skipped, unfinished ones resume at their newest checkpoint; Ctrl-C and SIGTERM
save first and exit with 130 and 143. A recipe is Python code: run only those that you trust.

On a pod of TPUs every host runs the same command; elsewhere several processes are one job with

    ... --coordinator=HOST:PORT --process_count=2 --process_id=0     # and another one with 1

A signal to one of them stops all at one step, and they share the folder --workdir. When one is
lost, the others end with status 1 or JAX's own; the same command goes on, on any number of them.

`--json` writes the report: `rows` (scores of each run by domain), `not_finished`, `pictures`.
"""

import shlex
import sys
from typing import Any

import jax
import rich.console
from absl import flags

from bam_jax import cli
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.parallel import distributed, processes
from bam_jax.recipes import datasets, graph, runner
from bam_jax.reports import report
from bam_jax.train import stop

_CONFIG = cli.define_recipe()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of all the runs and of the report; one on a disk, or gs://BUCKET/FOLDER.'
)
_RUNS = flags.DEFINE_list('runs', [], 'Names of the runs to train; default: all.')
distributed.define_flags()


@distributed.joined()
def main() -> dict[str, Any] | None:
  """Trains what the flags ask for, and reports."""
  parsed = cli.read_recipe(_CONFIG)
  if not _WORKDIR.value:
    raise UserError('Where to? Give --workdir=FOLDER.')
  if '://' in _WORKDIR.value and not folders.in_bucket(_WORKDIR.value):
    raise UserError(f'--workdir={_WORKDIR.value} is neither a folder nor gs://BUCKET/FOLDER.')
  workdir = folders.at(_WORKDIR.value)
  folders.check_bucket(workdir)
  processes.check_shared(workdir)
  parsed = datasets.with_workdir(parsed, workdir)
  nodes = graph.resolve(parsed)
  dataset = datasets.open_dataset(parsed.data)
  try:
    runner.execute(parsed, workdir, dataset, _RUNS.value, jax.process_index() == 0)
  except stop.Stopped as stopped:
    if jax.process_index() == 0:
      print(f'Stopped by {stopped}; the same command goes on from here.', file=sys.stderr)
    sys.exit(128 + stopped.signum)
  if jax.process_index():
    return None
  runner.write_command(workdir, parsed, shlex.join(['python', '-m', 'bam_jax.main', *sys.argv[1:]]))
  facts = report.write(workdir, list(nodes))
  rich.console.Console(stderr=True).print(report.table(facts))
  print(f'{workdir}/report/report.md has this, the costs and the pictures.', file=sys.stderr)
  return facts


if __name__ == '__main__':
  # Orbax logs a traceback of every error that is reported in a sentence.
  cli.run(main)
