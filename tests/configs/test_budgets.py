"""The comparison at equal training compute is one: of FLOPs, data and schedule."""

import runpy
from pathlib import Path

import pytest

from bam_jax import config
from bam_jax.account import accounting
from bam_jax.cli import recipe_file

PATH = str(Path(__file__).parents[2] / 'configs' / 'budgets.py')


def test_every_mixture_has_the_flops_of_its_budget():
  with recipe_file.importable([f'--config={PATH}']):
    recipe = config.parse(runpy.run_path(PATH)['get_config']().to_dict())
  rows = {row['run']: row for row in accounting.account(recipe)['rows']}
  of_btx = rows['btx_random_1']['budget_flops']
  assert len(rows) == 4 + 3 * 2 * 4
  for name in list(rows)[4:]:
    budget = {'0': 0, '1_3': 1 / 3, '1': 1, '3': 3}[name.split('_', 2 + name.startswith('bam'))[-1]]
    step = rows[name]['training_flops']['total'] * rows[name]['step_tokens']
    assert rows[name]['budget_flops'] == pytest.approx(budget * of_btx, abs=step)
    run, other = recipe.runs[name], recipe.runs['btx_random_1']
    for key in ('data', 'data_seed', 'batch_size', 'loss', 'optimizer'):
      assert getattr(run, key) == getattr(other, key)
    assert run.schedule.peak_learning_rate == other.schedule.peak_learning_rate
