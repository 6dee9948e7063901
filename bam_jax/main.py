"""Trains the runs of a recipe, in order, from where they stopped, and writes the report.

    python -m bam_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
    python -m bam_jax.main --config=configs/quickstart.py --workdir=runs/quickstart --runs=seed,code
    python -m bam_jax.main --config=... --workdir=... --config.runs.seed.tokens=1000000

Finished runs are skipped, unfinished ones resume at their newest checkpoint; Ctrl-C and SIGTERM
save first and exit with 130 and 143. A recipe is Python code: run only those that you trust.

`--json` writes the report: `rows` (a run's scores by domain), `unfinished`, `readings`, `pictures`.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import rich.console
from absl import flags
from ml_collections import config_flags

from bam_jax import cli, config, graph, recipe, report
from bam_jax.data import prepare, shards, sources
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.train import stop

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The recipe; FILE.py or FILE.py:ARGUMENT.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of all the runs and of the report.')
_RUNS = flags.DEFINE_list('runs', [], 'Names of the runs to train; default: all.')

SAMPLE = Path(__file__).parent / 'data' / 'sample'


def main() -> dict[str, Any] | None:
  """Trains what the flags ask for, and reports."""
  if _CONFIG.value is None:
    raise UserError('Which recipe? Give --config=FILE.py.')
  if not _WORKDIR.value:
    raise UserError('Where to? Give --workdir=FOLDER.')
  workdir = Path(_WORKDIR.value)
  parsed = recipe.with_workdir(_parsed_config(), workdir)
  nodes = graph.resolve(parsed)
  dataset = open_dataset(parsed.data)
  try:
    recipe.execute(parsed, workdir, dataset, _RUNS.value, jax.process_index() == 0)
  except stop.Stopped as stopped:
    print(f'Stopped by {stopped}; the same command goes on from here.', file=sys.stderr)
    sys.exit(128 + stopped.signum)
  if jax.process_index():
    return None
  recipe.write_command(workdir, parsed, shlex.join(['python', '-m', 'bam_jax.main', *sys.argv[1:]]))
  facts = report.write(workdir, list(nodes))
  rich.console.Console().print(report.table(facts))
  print(f'{workdir}/report/report.md has this table, the costs and the pictures.')
  return facts


def _parsed_config() -> config.Recipe:
  try:
    plain = _CONFIG.value.to_dict()  # a config file that is not there is noticed only here
  except OSError:
    name = config_flags.get_config_filename(flags.FLAGS['config'])
    raise UserError(f'--config={name} cannot be read: name a recipe, FILE.py.') from None
  return config.parse(plain)


def open_dataset(data: config.Data) -> shards.Dataset:
  """The token shards of a recipe, prepared first when they are missing and the recipe says how."""
  path = Path(data.path)
  if data.prepare and not (path / shards.MANIFEST).exists():
    options = data.prepare
    source = str(SAMPLE) if options.input == 'sample' else options.input
    prepare.prepare(
      sources.find_domains([source]),
      path,
      tokenizer=Tokenizer.load(options.tokenizer) if options.tokenizer else None,
      train_tokenizer=options.train_tokenizer or None,
    )
  return shards.open_dataset(path)


if __name__ == '__main__':
  cli.run(main)
