"""What `evaluate --tasks` asks of lm-eval: tasks by name, and a checkpoint's scores in them."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lm_eval
from lm_eval.tasks import TaskManager

from bam_jax import checkpoint
from bam_jax.errors import UserError
from bam_jax.tasks import adapter, code, offline, sets
from bam_jax.tasks.session import GROUPS, Options


class Loaded(NamedTuple):
  """Tasks that are known, and whose data is there."""

  manager: TaskManager
  specs: list[Any]  # for lm-eval
  tasks: Mapping[str, Any]  # by name, those of groups too


class Scores(NamedTuple):
  """Of one checkpoint."""

  row: dict[str, Any]  # of `--json`
  samples: Mapping[str, Sequence[Mapping[str, Any]]]  # lm-eval's, by task


def load(tasks: Sequence[str | sets.Questions]) -> Loaded:
  """Finds tasks and their data; UserError when one is unknown or has none."""
  for name in ('lm_eval', 'datasets', 'httpx'):
    logging.getLogger(name).setLevel(logging.ERROR)
  # lm-eval bootstraps some errors in processes that it forks, which JAX's threads do not survive.
  os.environ['DISABLE_MULTIPROC'] = '1'
  # Reading the names of its thousands of tasks takes it seconds, which files need not wait for.
  named = any(isinstance(task, str) for task in tasks)
  manager = TaskManager(include_path=GROUPS, include_defaults=named)
  specs = []
  for task in tasks:
    if isinstance(task, sets.Questions):
      specs.append(offline.task(task))
    elif task in manager.all_tasks or task.endswith('.yaml'):
      specs.append(task)
    else:
      raise UserError(
        f'--tasks={task} is no task of lm-eval, no .yaml and no .jsonl: mend it, or see '
        '`python -m bam_jax.tasks ls tasks`.'
      )
  found: dict[str, Any] = {}
  for task, spec in zip(tasks, specs):
    name = task.name if isinstance(task, sets.Questions) else task
    try:
      more = manager.load([spec])['tasks']
    except Exception as error:  # whatever a task's own files and the loaders of its data raise
      why = ' '.join(str(error).split()) or type(error).__name__
      raise UserError(f'--tasks={name} cannot be loaded ({why}).') from error
    twice = sorted(set(found) & set(more))
    if twice:
      raise UserError(f'--tasks={name} has {twice[0]} for the second time: name it once.')
    found |= more
  return Loaded(manager, specs, found)


def unsafe(loaded: Loaded) -> list[str]:
  """Names of the tasks that run what a model writes; UserError for one that does so elsewhere."""
  names = [name for name, task in loaded.tasks.items() if getattr(task, 'UNSAFE_CODE', False)]
  for name in names:
    if loaded.tasks[name].config.process_results not in (code.human_eval, code.mbpp):
      raise UserError(
        f'--tasks: {name} runs programs without the limits of this project: take bam_humaneval or '
        'bam_mbpp.'
      )
  return names


def score(path: str, loaded: Loaded, options: Options) -> Scores:
  """Asks a checkpoint everything."""
  meta = checkpoint.read_meta(path)
  sizes = {'data': options.mesh.data, 'fsdp': options.mesh.fsdp}
  sizes |= {'expert': options.mesh.expert, 'tensor': options.mesh.tensor}
  model = adapter.Model(
    path, options.dtype, options.batch_size, options.window, options.seed, **sizes
  )
  results = lm_eval.simple_evaluate(
    model,
    tasks=loaded.specs,
    task_manager=loaded.manager,
    num_fewshot=options.few_shot,
    limit=options.most,
    confirm_run_unsafe_code=options.allow_generated_code,
  )
  row = {
    'checkpoint': path,
    'run': meta.run,
    'step': meta.step,
    'method': meta.method,
    'tokenizer_hash': meta.tokenizer_hash,
    'window': model.max_length,
    'tasks': {
      name: {
        'few_shot': results['n-shot'].get(name),
        'questions': results['n-samples'][name]['effective'],
        'metrics': _metrics(results['results'][name]),
      }
      for name in loaded.tasks
    },
    'groups': {name: _metrics(facts) for name, facts in results.get('groups', {}).items()},
  }
  return Scores(row, results['samples'])


def _metrics(facts: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
  """Of lm-eval's `metric,filter` and `metric_stderr,filter`; the filter `none` goes unsaid."""
  made = {}
  for key, value in facts.items():
    metric, comma, name = key.partition(',')
    if comma and not metric.endswith('_stderr'):
      error = facts.get(f'{metric}_stderr,{name}')
      error = float(error) if isinstance(error, int | float) else None
      made[metric if name == 'none' else key] = {'value': float(value), 'stderr': error}
  return made
