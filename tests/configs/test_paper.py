"""The paper's recipes: every number of its tables, every ablation, and small runs of the graphs."""

import dataclasses
import functools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from bam_jax import config
from bam_jax.account import accounting
from bam_jax.cli import recipe_file
from bam_jax.model import arithmetic
from bam_jax.recipes import graph

ROOT = Path(__file__).parents[2]
ABLATIONS = ('btx_5', 'btx_6', 'btx_7', 'btx_8', 'btx_6_top3', 'bam_top1', 'bam_top2', 'sparse',
             'average', 'cm', 'dm')  # fmt: skip
EVERY = ('small_590m', 'large_2b', *(f'ablations:{name}' for name in ABLATIONS))
CASES = [  # a few by default
  name if name in ('small_590m', 'large_2b', 'ablations:bam_top2', 'ablations:cm')
  else pytest.param(name, marks=pytest.mark.slow)
  for name in EVERY
]  # fmt: skip
BRANCHES = ('seed', 'code', 'law', 'math')
ALL_DOMAINS = dict.fromkeys(('general', 'code', 'law', 'math'), 0.25)


@functools.cache
def get_config(file: str):
  path = str(ROOT / 'configs' / f'{file}.py')
  with recipe_file.importable([f'--config={path}']):
    return runpy.run_path(path)['get_config']


@functools.cache
def load(name: str, *options: str) -> config.Recipe:
  """`load('ablations:cm', 'smoke')`, as `--config=configs/ablations.py:cm,smoke` has it."""
  file, *argument = name.split(':')
  return config.parse(get_config(file)(','.join([*argument, *options])).to_dict())


@functools.cache
def resolve(name: str, *options: str) -> dict[str, graph.Node]:
  return graph.resolve(load(name, *options))


@functools.cache
def rows_of(name: str) -> dict[str, dict]:
  against = 'btx' if 'btx' in load(name).runs else ''
  return {row['run']: row for row in accounting.account(load(name), against=against)['rows']}


@pytest.mark.parametrize('name', CASES)
def test_the_graph(name):
  recipe, nodes = load(name), resolve(name)
  assert tuple(nodes)[:4] == BRANCHES and 'btx' in nodes and len(nodes) > 5
  assert recipe.evaluation.domains == ('general', 'code', 'law', 'math')
  seed, btx = recipe.runs['seed'].schedule, recipe.runs['btx']
  for run, node in nodes.items():
    mesh, experts = node.run.mesh, node.model.ffn_experts
    assert mesh.size == (64 if name == 'large_2b' else 16), 'the stated hardware'
    assert (experts.num_experts if experts else 1) % mesh.expert == 0
    assert recipe.evaluation.batch_size % mesh.batch_shards == 0
    if run == 'seed':
      assert node.run.init == 'scratch' and node.run.data == {'general': 1.0}
    elif run in BRANCHES:
      half = dataclasses.replace(seed, peak_learning_rate=seed.peak_learning_rate / 2)
      assert node.run.init == config.FromRun('seed') and node.run.schedule == half
      assert node.run.data == {run: 0.9, 'general': 0.1}
    else:
      assert node.upcycle.sources == (('seed',) if run == 'sparse' else BRANCHES)
      # Same batches for all, in the same order, as far as each one goes.
      assert (node.run.data, node.run.data_seed) == (ALL_DOMAINS, btx.data_seed)
      assert node.run.schedule == btx.schedule
  assert rows_of(name).keys() == nodes.keys(), 'every mesh divides every model'


@pytest.mark.parametrize('argument', [
  '', 'budgets', *(pytest.param(name, marks=pytest.mark.slow) for name in (
    'main', 'learning_rates', 'starts', 'vocabulary')),
])  # fmt: skip
def test_mixtures_of_the_reproduction_spend_what_btx_does(argument):
  recipe, rows = load(f'reproduction:{argument}'), rows_of(f'reproduction:{argument}')
  tokens = recipe.runs['seed'].batch_size * recipe.data.sequence_length
  spends = lambda name, steps: rows[name]['training_flops']['total'] * steps * tokens
  for name in list(recipe.runs)[4:]:
    steps = recipe.total_steps(name)
    if name == 'btx_short':
      assert steps == load('reproduction:main').total_steps('bam_kv_cm')
    elif re.search('_cm(_|$)', name) or re.search('_top[12]$', name):
      base, limit = ('btx_long', 1464) if name.endswith('_long') else ('btx', 488)
      budget = spends(base, limit)
      assert spends(name, steps) <= budget < spends(name, steps + 1), 'as many steps as BTX buys'
      assert recipe.total_steps(base) == limit
    else:
      assert steps == (1464 if name.endswith('_long') else 488)


SCHEDULES = {
  # Seed and mixture: batch and tokens; peak, warm-up and final fraction of the learning rate. Then
  # the tokens of a batch, and the FLOPs of all runs that the recipe's docstring states.
  'small_590m': ((400e9, 1.2e-4, 1500, 0.10), (100e9, 1.2e-4, 1500, 0.10), 2**20, 2.1e21),
  'large_2b': ((750e9, 1e-2, 2000, 0.03), (200e9, 1e-4, 1000, 0.10), 2**22, 2.3e22),
}


@pytest.mark.parametrize('name', SCHEDULES)
def test_budgets_and_schedules(name):
  recipe, (seed, mixture, batch, total) = load(name), SCHEDULES[name]
  assert {recipe.runs[run].tokens for run in BRANCHES[1:]} == {100e9}
  mixtures = dict.fromkeys(list(recipe.runs)[4:], mixture)
  for run, (tokens, *schedule) in {'seed': seed, **mixtures}.items():
    assert recipe.runs[run].tokens == tokens
    assert recipe.runs[run].schedule == config.Schedule(*schedule)
  for run in recipe.runs:
    assert recipe.step_tokens(run) == batch
    assert recipe.runs[run].optimizer.weight_decay == 0.1
    assert recipe.total_steps(run) == recipe.runs[run].tokens // batch
    assert recipe.warmup_steps(run) == recipe.runs[run].schedule.warmup_steps
  assert float(f'{sum(row["budget_flops"] for row in rows_of(name).values()):.1e}') == total


@pytest.mark.parametrize('name', CASES[2:])
def test_ablations_are_matched_by_data_or_by_compute(name):
  recipe, rows = load(name), rows_of(name)
  budget = rows['btx']['budget_flops']
  for run in set(rows) - {*BRANCHES, 'btx'}:
    step = rows[run]['step_tokens'] * rows[run]['training_flops']['total']
    if run.endswith('_cm') or run.startswith('bam_top'):
      assert budget - step < rows[run]['budget_flops'] <= budget
      assert rows[run]['steps'] == rows[run]['matched_steps']
      assert recipe.runs[run].tokens == rows[run]['tokens']  # whole steps
    else:
      assert rows[run]['tokens'] == rows['btx']['tokens']


@pytest.mark.slow
def test_runs_of_one_name_are_one_run():
  """So that every ablation can share a workdir with the small recipe, and with the others."""
  known = {}
  for name in ('small_590m', *(f'ablations:{ablation}' for ablation in ABLATIONS)):
    for run, node in resolve(name).items():
      assert known.setdefault(run, node.identity) == node.identity


def test_the_public_model_has_its_own_shape():
  recipe = load('smollm2')
  assert arithmetic.parameters(recipe.model).total == 134_515_008
  assert recipe.runs['seed'].tokens == 0 and len(recipe.runs) == 7


SMOKES = {
  'small_590m': 'small_590m.py:smoke',
  'ablations:bam_top2': 'ablations.py:bam_top2,smoke',
  'smollm2': 'smollm2.py:smoke',
}


@pytest.mark.slow
@pytest.mark.parametrize('name', SMOKES)
def test_smoke_runs_from_end_to_end(name, tmp_path):
  recipe = load(name, 'smoke')
  done = subprocess.run(
    [sys.executable, '-m', 'bam_jax.main', f'--config=configs/{SMOKES[name]}',
     f'--workdir={tmp_path}', f'--json={tmp_path}/facts.json'],
    cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True,
    timeout=900,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  facts = json.loads((tmp_path / 'facts.json').read_text())
  assert [row['run'] for row in facts['rows']] == list(graph.resolve(recipe))
  expected = {row['run']: row for row in accounting.account(recipe)['rows']}
  for row in facts['rows']:
    assert row['step'] == recipe.total_steps(row['run'])
    # Four steps of a random model: somewhere about the vocabulary's size.
    assert all(1 < p < 10 * recipe.model.vocab_size for p in row['perplexity'].values())
    assert row['parameters'] == expected[row['run']]['parameters']['total']
    assert row['flops_per_token'] == expected[row['run']]['training_flops']['total']
  assert (tmp_path / 'report' / 'report.md').exists()
