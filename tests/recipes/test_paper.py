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
from bam_jax.errors import UserError
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
  return runpy.run_path(str(ROOT / 'configs' / f'{file}.py'))['get_config']


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
def test_runs_of_the_reproduction_differ_in_what_their_names_say(argument):
  recipe, rows = load(f'reproduction:{argument}'), rows_of(f'reproduction:{argument}')
  assert list(recipe.runs)[:4] == list(BRANCHES)
  seed = recipe.runs['seed']
  assert seed.data == {'general': 0.7, 'code': 0.1, 'law': 0.1, 'math': 0.1}
  assert (recipe.total_steps('seed'), seed.schedule.peak_learning_rate) == (1953, 4e-3)
  for name in BRANCHES[1:]:
    run = recipe.runs[name]
    assert run.data == {name: 0.9, 'general': 0.1} and run.init.run == 'seed'
    assert (recipe.total_steps(name), run.schedule.peak_learning_rate) == (488, 2e-3)
  tokens = seed.batch_size * recipe.data.sequence_length
  spends = lambda name, steps: rows[name]['training_flops']['total'] * steps * tokens
  for name in list(recipe.runs)[4:]:
    run, steps = recipe.runs[name], recipe.total_steps(name)
    assert (run.data, run.data_seed, run.batch_size) == (ALL_DOMAINS, 2, 16)
    number = re.search(r'_0_(0\d+)$', name)
    peak = float(f'0.{number[1]}') if number else 2e-3
    warmup = 10 if name.endswith('_soon') else 50
    assert run.schedule == config.Schedule(peak, warmup, 0.1)
    factors = {'blocks/*/router': 4.0} if name.endswith('_fast') else {}
    assert run.learning_rate_factors == factors
    routed = re.search('_top[12]$', name)
    if name == 'btx_short':
      assert steps == load('reproduction:main').total_steps('bam_kv_cm')
    elif re.search('_cm(_|$)', name) or routed:
      base, limit = ('btx_long', 1464) if name.endswith('_long') else ('btx', 488)
      budget = spends(base, limit)
      assert spends(name, steps) <= budget < spends(name, steps + 1), 'as many steps as BTX buys'
      assert recipe.total_steps(base) == limit
    else:
      assert steps == (1464 if name.endswith('_long') else 488)
    if name == 'dense':
      assert run.init.run == 'seed'
      continue
    mixed, kind = run.init.upcycle, re.match('btx|bam_kv|bam_shared|bam|sparse|average', name)[0]
    methods = {'bam': 'bam_kv_experts', 'bam_kv': 'bam_kv_experts', 'bam_shared': 'bam_shared_kv'}
    experts = re.match('btx_([5-8])', name)
    assert (mixed.method, mixed.sources, mixed.experts, mixed.top_k, mixed.attention_top_k) == (
      methods.get(kind, kind),
      ('seed',) if kind == 'sparse' else BRANCHES,
      int(experts[1]) if experts else 4,
      3 if name == 'btx_6_top3' else 1,
      int(name[-1]) if routed else 0,
    )
    assert mixed.router_scale == (4 if re.search('_(sharp|right)$', name) else 1)
    assert mixed.router_init == ('centroids' if name.endswith('_right') else 'random')


def test_the_studies_of_the_reproduction():
  main, every = (set(load(f'reproduction:{argument}').runs) for argument in ('main', ''))
  bams = {'bam_kv', 'bam_shared_kv'}
  assert main == {*BRANCHES, 'btx', 'btx_6_top3', *bams, *(f'{bam}_cm' for bam in bams)}
  assert every - main == {
    'btx_5', 'btx_6', 'btx_7', 'btx_8', 'sparse', 'average', 'dense',
    *(f'{bam}_top{k}' for bam in ('bam', 'bam_shared') for k in (1, 2)),
  }  # fmt: skip
  assert set(load('reproduction:smoke').runs) == every
  for argument, ratio in (('main', 1.79), ('vocabulary', 1.35)):
    rows = rows_of(f'reproduction:{argument}')
    flops = {run: rows[run]['training_flops']['total'] for run in ('bam_kv', 'btx')}
    assert flops['bam_kv'] / flops['btx'] == pytest.approx(ratio, abs=0.005)


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


def test_the_large_mixture_budget_is_the_papers_core_days():
  """305 core-days at the speed of the small scale's 25, for 100B tokens of BTX."""
  flops = {name: arithmetic.training_flops(resolve(name)['btx'].model, 2048) for name in SCHEDULES}
  tokens = 305 / 25 * 100e9 * flops['small_590m'] / flops['large_2b']
  assert load('large_2b').runs['btx'].tokens == pytest.approx(tokens, rel=0.01)


@pytest.mark.parametrize('name, run, expected', [
  ('small_590m', 'btx', ('btx', 4, 1, 0)),
  ('small_590m', 'bam_kv', ('bam_kv_experts', 4, 1, 0)),
  ('ablations:btx_5', 'btx_5', ('btx', 5, 1, 0)),
  ('ablations:btx_6_top3', 'btx_6_top3', ('btx', 6, 3, 0)),
  ('ablations:bam_top2', 'bam_top2', ('bam_kv_experts', 4, 1, 2)),
  ('ablations:sparse', 'sparse', ('sparse', 4, 1, 0)),
  ('ablations:average', 'average', ('average', 4, 1, 0)),
  ('ablations:cm', 'bam_shared_kv_cm', ('bam_shared_kv', 4, 1, 0)),
])  # fmt: skip
def test_methods(name, run, expected):
  made = load(name).runs[run].init.upcycle
  assert (made.method, made.experts, made.top_k, made.attention_top_k) == expected


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


@pytest.mark.parametrize('name', CASES)
def test_smoke_keeps_the_structure(name):
  whole, small = resolve(name), resolve(name, 'smoke')
  assert list(whole) == list(small)
  for run, node in small.items():
    model, original = node.model, whole[run].model
    for field in ('attention_experts', 'ffn_experts', 'tied_embeddings'):
      assert getattr(model, field) == getattr(original, field)
    assert model.num_heads * original.num_kv_heads == original.num_heads * model.num_kv_heads
    assert model.ffn_dim * original.d_model == original.ffn_dim * model.d_model
    assert model.num_heads * model.head_dim == model.d_model
    assert node.run.compute.dtype == 'bfloat16'
    assert node.run.grad_accum_steps == 2 and node.run.mesh.size == 1
    micro_batch = node.run.batch_size // 2 * load(name, 'smoke').data.sequence_length
    assert 0 < node.run.compute.loss_chunk < micro_batch
    assert load(name, 'smoke').total_steps(run) == 4


@pytest.mark.parametrize('file, argument, names', [
  ('ablations', 'moe', ABLATIONS), ('small_590m', 'tiny', ['use none, or smoke']),
])  # fmt: skip
def test_unknown_arguments_are_refused(file, argument, names):
  with pytest.raises(UserError) as caught:
    get_config(file)(argument)
  assert all(name in str(caught.value) for name in names)


SMOKES = {
  'small_590m': 'small_590m.py:smoke',
  'large_2b': 'large_2b.py:smoke',
  'ablations:bam_top2': 'ablations.py:bam_top2,smoke',
  'reproduction': 'reproduction.py:smoke',
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
    assert row['step'] == 4
    # Four steps of a random model: somewhere about the vocabulary's size.
    assert all(1 < p < 10 * recipe.model.vocab_size for p in row['perplexity'].values())
    assert row['parameters'] == expected[row['run']]['parameters']['total']
    assert row['flops_per_token'] == expected[row['run']]['training_flops']['total']
  assert (tmp_path / 'report' / 'report.md').exists()
