"""Trains the runs of a recipe in order, resuming where they stopped, and writes the report.

    python -m bam_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
    python -m bam_jax.main --config=configs/quickstart.py --workdir=runs/quickstart --runs=seed,code
    python -m bam_jax.main --config=... --workdir=... --config.runs.seed.tokens=1000000

Finished runs are skipped, unfinished ones resume from their newest checkpoint; Ctrl-C and SIGTERM
save first and exit with 130 and 143. A recipe is Python code: run only those that you trust.

On a TPU pod every host runs the same command; elsewhere several processes form one job with

    ... --coordinator=HOST:PORT --process_count=2 --process_id=0     # and another with 1

All processes share the folder --workdir. A signal to one of them stops all after the same step.
If one is lost, the others exit with status 1 or JAX's own; the same command resumes, on any number
of processes.

`--json` writes the report: `rows` (scores of each run by domain), `not_finished`, `pictures`.
"""

import dataclasses
import sys
from typing import Any

import jax
import rich.console
from absl import flags

from bam_jax import cli
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.parallel import distributed
from bam_jax.prepare import recipe_data
from bam_jax.recipes import graph, runner
from bam_jax.reports import report
from bam_jax.train import stop

_CONFIG = cli.define_recipe()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Of runs and report; may be gs://BUCKET/FOLDER.')
_RUNS = flags.DEFINE_list('runs', [], 'Names of the runs to train; default: all.')
# Of a job of several processes; `distributed.joined` reads them.
flags.DEFINE_string(
  'coordinator',
  None,
  'For a job of several processes: HOST:PORT of process 0, or "auto" under SLURM, Open MPI or '
  'Kubernetes. TPU pods need none of these flags.',
)
for _name, _default, _lower, _text in (
  ('process_count', None, 1, 'Number of processes of the job.'),
  ('process_id', None, 0, 'Index of this process, from 0.'),
  ('join_timeout', 300, 1, 'Seconds to wait for all processes to start.'),
  ('lost_timeout', 100, 5, 'Seconds without heartbeat until a process counts as lost.'),
):
  flags.DEFINE_integer(_name, _default, _text, lower_bound=_lower, upper_bound=10**6)


@distributed.joined()
def main() -> dict[str, Any] | None:
  """Trains the selected runs and writes the report."""
  recipe, path = cli.read_recipe(_CONFIG), _WORKDIR.value
  if not path:
    raise UserError('--workdir is required: the folder for the runs and the report.')
  if '://' in path and not folders.in_bucket(path):
    raise UserError(f'--workdir={path} is neither a folder nor gs://BUCKET/FOLDER.')
  workdir = folders.at(path)
  folders.check_bucket(workdir)
  path, *more = (
    at.replace('{workdir}', str(workdir)) for at in (recipe.data.path, *recipe.data.more)
  )
  data = dataclasses.replace(recipe.data, path=path, more=tuple(more))
  recipe = dataclasses.replace(recipe, data=data)
  nodes = graph.resolve(recipe)
  dataset = recipe_data.open_dataset(recipe.data)
  try:
    runner.execute(recipe, workdir, dataset, _RUNS.value)
  except stop.Stopped as stopped:
    if jax.process_index() == 0:
      print(f'Stopped by {stopped}; the same command resumes from here.', file=sys.stderr)
    sys.exit(128 + stopped.signum)
  if jax.process_index():
    return None
  runner.write_command(workdir, recipe, cli.command())
  facts = report.write(workdir, list(nodes))
  rich.console.Console(stderr=True).print(report.table(facts))
  print(f'{workdir}/report/report.md has this table, the costs and the routing.', file=sys.stderr)
  return facts


if __name__ == '__main__':
  cli.run(main)
