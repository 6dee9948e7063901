"""`evaluate --tasks`: the scores of checkpoints in tasks of lm-eval, and their differences.

lm-eval is an optional dependency, so it is imported where it is used.
"""

import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.table
from scipy import stats

from bam_jax import cli, config
from bam_jax.config.strict import require
from bam_jax.errors import UserError
from bam_jax.evaluate import comparison

GROUPS = str(Path(__file__).parent / 'groups')  # our own tasks, as lm-eval's .yaml files
INSTALL = "pip install '.[tasks]' in a clone of bam_jax"
Samples = Mapping[str, Sequence[Mapping[str, Any]]]  # lm-eval's, by task


def run(
  checkpoints: Sequence[str], tasks: Sequence[str], options: comparison.Options
) -> dict[str, Any]:
  """Evaluates the checkpoints one after another; prints a table, and returns it as `--json` has it.

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
  scores = [_score(path, manager, tasks, found, options) for path in checkpoints]
  rows = [row for row, _ in scores]
  for row, samples in scores[1:]:
    add_differences(row['tasks'], samples, scores[0][1])
  cli.console().print(_table(rows))
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


def _score(path, manager, asked, tasks, options) -> tuple[dict[str, Any], Samples]:
  """A row of `--json`, and lm-eval's samples; `manager` and `tasks` are the results of `load`."""
  import lm_eval

  from bam_jax.tasks import adapter

  how = options.dtype, options.mesh, options.batch_size, options.window, options.seed
  model = adapter.Model(path, *how, options.without)
  results = lm_eval.simple_evaluate(
    model,
    tasks=asked,
    task_manager=manager,
    num_fewshot=options.few_shot,
    limit=options.max_documents,
  )
  row = {
    'checkpoint': path,
    **comparison.identity(model.meta),
    'window': model.max_length,
    'tasks': {
      name: {
        'few_shot': results['n-shot'].get(name),
        'questions': results['n-samples'][name]['effective'],
        'metrics': _metrics(results['results'][name]),
      }
      for name in tasks
    },
    'groups': {name: _metrics(facts) for name, facts in results.get('groups', {}).items()},
  }
  return row, results['samples']


def _metrics(facts: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
  """From lm-eval's `metric,filter` and `metric_stderr,filter`; the filter `none` is not named."""
  made = {}
  for key, value in facts.items():
    metric, comma, name = key.partition(',')
    if comma and not metric.endswith('_stderr'):
      error = facts.get(f'{metric}_stderr,{name}')
      error = float(error) if isinstance(error, int | float) else None
      made[metric if name == 'none' else key] = {'value': float(value), 'stderr': error}
  return made


def add_differences(tasks: Mapping[str, Any], samples: Samples, first: Samples) -> None:
  """Adds `difference` from the first checkpoint, and `difference_stderr`, to a row's metrics.

  They are taken question by question, and None for a metric that is not a mean over questions.
  """
  for name, facts in tasks.items():
    for metric, measure in facts['metrics'].items():
      ours, theirs = (_by_question(metric, some[name]) for some in (samples, first))
      paired = ours.keys() == theirs.keys()
      d = np.array([ours[n] - theirs[n] for n in ours] if paired else [])
      measure['difference'] = float(d.mean()) if len(d) else None
      measure['difference_stderr'] = float(stats.sem(d)) if len(d) > 1 else None


def _by_question(metric: str, samples: Sequence[Mapping[str, Any]]) -> dict[int, float]:
  """A metric by question; without the questions for which it is not a number."""
  name, _, wanted = metric.partition(',')
  return {
    sample['doc_id']: float(sample[name])
    for sample in samples
    if sample['filter'] == (wanted or sample['filter'])
    and isinstance(sample.get(name), int | float)
  }


def _table(rows: Sequence[Mapping[str, Any]]) -> rich.table.Table:
  """A column a checkpoint: scores, their errors, and in brackets the difference from the first."""
  runs = [row['run'] for row in rows]
  labels = [row['run'] if runs.count(row['run']) == 1 else row['checkpoint'] for row in rows]
  body = []
  for name, facts in rows[0]['tasks'].items():
    for metric in facts['metrics']:
      cells = [_cell(row['tasks'][name]['metrics'][metric]) for row in rows]
      body.append([name, str(facts['few_shot']), metric, *cells])
  for name, metrics in rows[0]['groups'].items():
    body += [[name, '', x, *(_cell(row['groups'][name][x]) for row in rows)] for x in metrics]
  return cli.table(None, ['task', 'shots', 'metric'], labels, body)


def _cell(measure: Mapping[str, float | None]) -> str:
  with_error = lambda text, error: text if error is None else f'{text} ± {error:.4f}'
  score = with_error(f'{measure["value"]:.4f}', measure['stderr'])
  if (difference := measure.get('difference')) is None:
    return score
  return f'{score} ({with_error(f"{difference:+.4f}", measure["difference_stderr"])})'
