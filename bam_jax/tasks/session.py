"""`evaluate --tasks`: the scores of checkpoints in tasks of lm-eval.

lm-eval is an optional dependency, so it is imported where it is used.
"""

import importlib.util
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_jax import cli, config
from bam_jax.config.strict import require
from bam_jax.errors import UserError
from bam_jax.evaluate import comparison

GROUPS = str(Path(__file__).parent / 'groups')  # our own tasks, as lm-eval's .yaml files
INSTALL = "pip install '.[tasks]' in a clone of bam_jax"
KEYS = 'results', 'groups', 'n-shot', 'n-samples', 'versions'  # of lm-eval's results


def run(
  checkpoints: Sequence[str], tasks: Sequence[str], options: comparison.Options
) -> dict[str, Any]:
  """Evaluates the checkpoints one after another and prints lm-eval's tables; returns `--json`.

  UserError when a task or a checkpoint is not found, or lm-eval is not installed.
  """
  comparison.open_checkpoints(checkpoints, options)  # what is wrong with one is reported first
  installed = importlib.util.find_spec('lm_eval')
  require(installed, f'--tasks requires lm-eval, which is not installed: {INSTALL}.')
  manager, found = load(tasks)
  for name, task in found.items():
    wrong = f'--tasks: {name} runs programs written by the model'
    fix = 'remove it, or run lm-eval itself, which asks for confirm_run_unsafe_code'
    require(not getattr(task, 'UNSAFE_CODE', False), f'{wrong}: {fix} (docs/evaluate.md).')
  check_examples(found, options.few_shot)
  rows = [_score(path, manager, tasks, options) for path in checkpoints]
  said = {key: getattr(options, key) for key in ('dtype', 'few_shot', 'max_documents')}
  return {'tasks': list(tasks), 'mesh': config.to_dict(options.mesh), **said, 'rows': rows}


def load(tasks: Sequence[str]) -> tuple[Any, dict[str, Any]]:
  """lm-eval's TaskManager, and all tasks by name, of groups too, with their data.

  UserError for a task that is named twice, unknown, or cannot be loaded.
  """
  from lm_eval.tasks import TaskManager

  for name in ('lm_eval', 'datasets', 'httpx'):
    logging.getLogger(name).setLevel(logging.ERROR)
  # lm-eval bootstraps some errors in forked processes, which JAX's threads do not survive.
  os.environ['DISABLE_MULTIPROC'] = '1'
  for name in tasks:
    require(tasks.count(name) == 1, f'--tasks has {name} twice: name it once.')
  # Indexing lm-eval's thousands of tasks takes seconds, which files need not wait for.
  by_name = not all(task.endswith('.yaml') for task in tasks)
  manager = TaskManager(include_path=GROUPS, include_defaults=by_name)
  try:
    return manager, manager.load(tasks)['tasks']
  except Exception as error:  # anything that a task's files and the loaders of its data raise
    reason = ' '.join(str(error).split()) or type(error).__name__
    hint = '`lm_eval ls tasks` lists the tasks of lm-eval'
    raise UserError(f'--tasks={",".join(tasks)} cannot be loaded ({reason}): {hint}.') from error


def check_examples(tasks: Mapping[str, Any], few_shot: int | None) -> None:
  """UserError when a task has fewer solved examples than are asked for."""
  for name, task in tasks.items():
    if few_shot and task.config.num_fewshot != 0:  # a task that says 0 has none, whatever is asked
      try:
        task.fewshot_context(next(iter(task.eval_docs)), few_shot)
      except (AssertionError, ValueError) as error:
        wrong = f'--few_shot={few_shot}: {name} has fewer solved examples for a question'
        raise UserError(f'{wrong} ({error}): lower it.') from error


def _score(path, manager, tasks, options: comparison.Options) -> dict[str, Any]:
  """A row of `--json`; `manager` is a result of `load`."""
  import lm_eval
  from lm_eval import utils

  from bam_jax.tasks import adapter

  model = adapter.Model(path, options)
  found = lm_eval.simple_evaluate(
    model,
    tasks=tasks,
    task_manager=manager,
    num_fewshot=options.few_shot,
    limit=options.max_documents,
  )
  console = cli.console()
  console.print(path, soft_wrap=True)
  for column in ('results', 'groups'):
    if found.get(column):
      console.print(utils.make_table(found, column), soft_wrap=True)
  facts = {key: found.get(key, {}) for key in KEYS}
  plain = json.loads(json.dumps(facts, default=utils.handle_non_serializable))
  identity = comparison.identity(model.meta)
  return {'checkpoint': path, **identity, 'window': model.max_length, **plain}
