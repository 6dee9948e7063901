"""Downstream tasks for checkpoints, one after another: `evaluate --tasks`."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rich.console

from bam_jax import checkpoint, config
from bam_jax.errors import UserError
from bam_jax.evaluate.programs import rows_mesh
from bam_jax.parallel import sharding
from bam_jax.tasks import paired, sandbox, sets, tables

GROUPS = str(Path(__file__).parent / 'groups')  # tasks of our own, for lm-eval
INSTALL = f'pip install -r {Path(__file__).with_name("requirements.txt")}'


class Options(NamedTuple):
  """How tasks are computed."""

  dtype: str
  mesh: config.Mesh = config.Mesh()
  batch_size: int = 16
  window: int | None = None  # tokens that are read at once; None: what each was trained at
  seed: int = 0  # of draws
  few_shot: int | None = None  # solved questions before each one; None: as the tasks say
  most: int | None = None  # questions of a task; None: all
  allow_generated_code: bool = False


def run(checkpoints: Sequence[str], tasks: Sequence[str], options: Options) -> dict[str, Any]:
  """What `--json` has of tasks.

  Args:
    checkpoints: at least one.
    tasks: names of lm-eval's tasks and groups, `bam_paper`, its .yaml files, and files of `sets`.
    options: how.

  Raises:
    UserError: a checkpoint or a task is none, or lm-eval is not installed.
  """
  if not checkpoints:
    raise UserError('Which models? Give --checkpoint=DIR, once for each.')
  if len({str(checkpoint.find(path)) for path in checkpoints}) < len(checkpoints):
    raise UserError('A --checkpoint is given twice: name each checkpoint once.')
  sharding.make_mesh(rows_mesh(options.mesh))
  for path in checkpoints:
    checkpoint.open_tokenizer(path, checkpoint.read_meta(path))
  files = {task: sets.read(task) for task in tasks if sets.is_file(task)}
  _refuse_code((task for task, questions in files.items() if questions.kind == sets.CODE), options)
  # Not before what can be refused without it: seconds, and an extra.
  harness = _harness()
  loaded = harness.load([files.get(task, task) for task in tasks])
  _refuse_code(harness.unsafe(loaded), options)
  scores = [harness.score(path, loaded, options) for path in checkpoints]
  rows = [one.row for one in scores]
  for row, samples in scores[1:]:
    paired.add(row['tasks'], samples, scores[0].samples)
  console = rich.console.Console(stderr=True, markup=False, highlight=False)
  if not console.is_terminal:
    console.width = max(console.width, 120)
  console.print(tables.table(rows))
  return {
    'tasks': list(tasks),
    'dtype': options.dtype,
    'mesh': config.to_dict(options.mesh),
    'few_shot': options.few_shot,
    'max_documents': options.most,
    'rows': rows,
  }


def _refuse_code(names: Iterable[str], options: Options) -> None:
  """UserError for a task that runs what the model writes, unless that is allowed and can be."""
  names = sorted(names)
  if names and not options.allow_generated_code:
    raise UserError(
      f'--tasks: {names[0]} runs programs that the model writes: give --allow_generated_code, or '
      'leave it out.'
    )
  if names:
    sandbox.require()


def _harness() -> Any:
  """The module that talks to lm-eval."""
  try:
    import lm_eval  # noqa: F401
  except ImportError:
    raise UserError(f'--tasks needs lm-eval: {INSTALL}') from None
  from bam_jax.tasks import harness

  return harness
