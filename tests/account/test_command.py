"""The command's numbers: the paper's to the last one, states as they lie on devices, mistakes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bam_jax import config
from bam_jax.account import accounting
from bam_jax.errors import UserError
from bam_jax.parallel import sharding
from bam_jax.train import step

ROOT = Path(__file__).parents[2]


def run_command(*flags: str) -> subprocess.CompletedProcess:
  # A platform that is not there: counting must not ask for it.
  environment = os.environ | {'JAX_PLATFORMS': 'tpu', 'COLUMNS': '120'}
  return subprocess.run(
    [sys.executable, '-m', 'bam_jax.account', *flags], cwd=ROOT, env=environment,
    capture_output=True, text=True,
  )  # fmt: skip


def rows_of(*flags: str) -> tuple[dict[str, dict], str]:
  done = run_command(*flags, '--json=-')
  assert done.returncode == 0, done.stderr
  facts = json.loads(done.stdout)  # and nothing else is there
  return {row['run']: row for row in facts['rows']}, done.stderr


@pytest.fixture(scope='module')
def small():
  return rows_of('--config=configs/small_590m.py', '--context=256', '--against=btx')


@pytest.fixture(scope='module')
def top3():
  return rows_of('--config=configs/ablations.py:btx_6_top3', '--context=256', '--run=btx_6_top3')


TABLE_9 = {
  'seed': (587_209_728, 587_209_728),
  'btx': (700_480_512, 587_234_304),
  'bam_shared_kv': (738_253_824, 625_007_616),
  'bam_kv': (776_002_560, 662_756_352),
}


def test_table_9(small, top3):
  rows, printed = small
  for run, (total, active) in TABLE_9.items():
    assert rows[run]['parameters']['total'] == total
    assert rows[run]['active_parameters']['total'] == active
    assert f'{total:,}' in printed and f'{active:,}' in printed
  row = top3[0]['btx_6_top3']
  assert row['parameters']['total'] == 775_990_272
  assert row['active_parameters']['total'] == 662_744_064
  assert '775,990,272' in top3[1] and '662,744,064' in top3[1]


def test_the_large_seed():
  rows, printed = rows_of('--config=configs/large_2b.py', '--run=seed')
  assert rows.keys() == {'seed'}
  assert rows['seed']['parameters']['total'] == 1_991_289_600
  assert '1,991,289,600' in printed


def test_tables_7_and_10(small, top3):
  rows, printed = small
  layers = {run: rows[run]['layer_forward_flops'] for run in rows}
  layers |= {run: row['layer_forward_flops'] for run, row in top3[0].items()}
  assert layers['bam_kv']['attention'] == 35_651_584
  assert layers['btx']['attention'] == layers['btx_6_top3']['attention'] == 8_912_896
  assert '35,651,584' in printed and '8,912,896' in printed
  for run in ('bam_kv', 'bam_shared_kv', 'btx'):
    assert layers[run]['ffn'] == 3 * 1024 * 4096
    assert round((layers[run]['ffn'] + layers[run]['routers']) / 1e6, 1) == 12.6
  assert round((layers['btx_6_top3']['ffn'] + layers['btx_6_top3']['routers']) / 1e6, 1) == 37.8


def test_parts_add_up(small):
  for row in small[0].values():
    for key in ('parameters', 'active_parameters', 'forward_flops', 'training_flops'):
      *parts, total = (row[key][p] for p in ('embeddings', 'norms', 'attention', 'ffn', 'routers',
                                             'total'))  # fmt: skip
      assert sum(parts) == total
    for part, flops in row['layer_forward_flops'].items():
      assert 6 * flops == row['forward_flops'][part]
    assert row['training_flops']['total'] == 3 * row['forward_flops']['total']


def test_cache(small):
  rows, _ = small
  one = 6 * 2 * 1024 * 2  # layers, keys and values, D, bfloat16
  caches = dict(seed=1, btx=1, bam_shared_kv=1, bam_kv=4)
  assert {run: rows[run]['cache_bytes'] for run in caches} == {
    run: one * number for run, number in caches.items()
  }


def test_matching(small):
  rows, _ = small
  budget = rows['btx']['budget_flops']
  assert rows['btx']['matched_tokens'] == rows['btx']['tokens'] == 95_367 * 2**20
  for row in rows.values():
    flops = row['training_flops']['total']
    assert row['matched_tokens'] * flops <= budget < (row['matched_tokens'] + 1) * flops
    assert row['matched_steps'] == row['matched_tokens'] // 2**20
  assert rows['bam_kv']['matched_tokens'] < rows['bam_shared_kv']['matched_tokens']


def test_the_papers_errata(small, top3):
  """docs/paper.md: the paper's numbers come out when the parts that it names are left out."""
  page, router = (ROOT / 'docs' / 'paper.md').read_text(encoding='utf-8'), 6 * 1024 * 4
  active = lambda run: small[0][run]['active_parameters']['total']
  wrong = active('bam_kv') - router, active('bam_shared_kv') - router - 6 * 2 * 1024**2
  assert wrong == (662_731_776, 612_400_128)
  totals = small[0]['btx']['parameters']['total'], top3[0]['btx_6_top3']['parameters']['total']
  for number in (*wrong, active('bam_kv'), active('bam_shared_kv'), *totals):
    assert f'{number:,}' in page


@pytest.mark.parametrize('sizes', [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 4, 1), (2, 1, 2, 2)])
def test_bytes_per_device_are_those_of_a_state_on_the_devices(model, sizes):
  mesh, settings = config.Mesh(*sizes), (config.Compute(), config.Optimizer())
  expected = accounting.state_bytes(model, *settings, mesh)
  abstract = step.abstract_state(model, *settings, sharding.make_mesh(mesh))
  state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), abstract)
  for part, tree in (('parameters', state.params), ('optimizer', state.opt_state)):
    held = {}
    for shard in (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards):
      held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    assert len(held) == mesh.size and set(held.values()) == {expected[part]}
  assert expected['gradients'] == expected['parameters']
  assert expected['total'] == sum(v for k, v in expected.items() if k != 'total')


def test_moments_on_the_host_take_no_room_on_a_device(models):
  settings = config.Compute(offload_optimizer=True), config.Optimizer(), config.Mesh(fsdp=2)
  assert accounting.state_bytes(models['btx'], *settings)['optimizer'] == 4  # a counter


def test_devices_sum_to_the_whole(small):
  """But for norms, routers and the optimizer's counter, which every device has."""
  for row in small[0].values():
    count, devices = row['parameters'], row['devices']
    everywhere = count['norms'] + count['routers']
    whole = 4 * (count['total'] - everywhere)
    held = row['bytes_per_device']
    assert (held['parameters'] - 4 * everywhere) * devices == whole
    assert (held['optimizer'] - 8 * everywhere - 4) * devices == 2 * whole


def test_a_mesh_that_does_not_divide_is_refused(recipe_dict):
  recipe_dict['runs']['seed'] |= dict(batch_size=9, mesh=dict(fsdp=3))
  with pytest.raises(UserError, match=r'config.runs.seed.mesh cuts .* into 3 parts'):
    accounting.account(config.parse(recipe_dict))


MISTAKES = {
  'no config': ((), '--config is required: give --config'),
  'no file': (('--config=nowhere.py',), '--config=nowhere.py cannot be read'),
  'no such run': (
    ('--config=configs/quickstart.py', '--run=bam'),
    '--run=bam is not in',
  ),
  'no such budget': (
    ('--config=configs/quickstart.py', '--against=moe'),
    '--against=moe is not in',
  ),
  'no context': (('--config=configs/quickstart.py', '--context=0'), 'context'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_one_sentence_and_status_2(server, name):
  flags, sentence = MISTAKES[name]
  done = server.run('account', *flags, folder=ROOT)
  assert done.status == 2 and sentence in done.stderr, done.stderr
  assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout


def test_help_names_every_key(recipe_dict, door_doc):
  facts = accounting.account(config.parse(recipe_dict), against='btx')
  words = set(re.findall(r'\w+', door_doc('account')))
  assert facts.keys() <= words
  for row in facts['rows']:
    assert row.keys() <= words
    assert all(value.keys() <= words for key, value in row.items()
               if isinstance(value, dict) and key != 'mesh')  # fmt: skip
