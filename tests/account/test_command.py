"""The command's numbers: the paper's to the last one, states as they lie on devices, mistakes."""

import collections
import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bam_jax import config
from bam_jax.account import accounting
from bam_jax.model import transformer
from bam_jax.parallel import sharding
from bam_jax.train import step

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def rows_of(server):
  """The function (flags) -> rows of `--json` by run, and what is printed."""

  def run(*flags: str) -> tuple[dict[str, dict], str]:
    done = server.run('account', *flags, '--json=-', folder=ROOT)
    assert done.status == 0, done.stderr
    facts = json.loads(done.stdout)  # and nothing else is there
    return {row['run']: row for row in facts['rows']}, done.stderr

  return run


@pytest.fixture(scope='module')
def small(rows_of):
  return rows_of('--config=configs/small_590m.py', '--context=256', '--against=btx')


@pytest.fixture(scope='module')
def top3(rows_of):
  return rows_of('--config=configs/ablations.py:btx_6_top3', '--context=256', '--run=btx_6_top3')


TABLE_9 = {
  'seed': (587_209_728, 587_209_728),
  'btx': (700_480_512, 587_234_304),
  'bam_shared_kv': (738_253_824, 625_007_616),
  'bam_kv': (776_002_560, 662_756_352),
  'btx_6_top3': (775_990_272, 662_744_064),
}


def test_table_9(small, top3, rows_of):
  rows, printed = small[0] | top3[0], small[1] + top3[1]
  for run, (total, active) in TABLE_9.items():
    assert rows[run]['parameters']['total'] == total
    assert rows[run]['active_parameters']['total'] == active
    assert f'{total:,}' in printed and f'{active:,}' in printed
  large, printed = rows_of('--config=configs/large_2b.py', '--run=seed')
  assert large.keys() == {'seed'} and '1,991,289,600' in printed
  assert large['seed']['parameters']['total'] == 1_991_289_600


def test_tables_7_and_10(small, top3):
  layers = {run: row['layer_forward_flops'] for run, row in (small[0] | top3[0]).items()}
  assert layers['bam_kv']['attention'] == 35_651_584
  assert layers['btx']['attention'] == layers['btx_6_top3']['attention'] == 8_912_896
  assert '35,651,584' in small[1] and '8,912,896' in small[1]
  for run in ('bam_kv', 'bam_shared_kv', 'btx'):
    assert layers[run]['ffn'] == 3 * 1024 * 4096
    assert round((layers[run]['ffn'] + layers[run]['routers']) / 1e6, 1) == 12.6
  assert round((layers['btx_6_top3']['ffn'] + layers['btx_6_top3']['routers']) / 1e6, 1) == 37.8


def test_the_papers_errata(small, top3):
  """docs/paper.md: the paper's numbers come out when the parts that it names are left out."""
  page, router = (ROOT / 'docs' / 'paper.md').read_text(encoding='utf-8'), 6 * 1024 * 4
  active = lambda run: small[0][run]['active_parameters']['total']
  wrong = active('bam_kv') - router, active('bam_shared_kv') - router - 6 * 2 * 1024**2
  assert wrong == (662_731_776, 612_400_128)
  totals = small[0]['btx']['parameters']['total'], top3[0]['btx_6_top3']['parameters']['total']
  for number in (*wrong, active('bam_kv'), active('bam_shared_kv'), *totals):
    assert f'{number:,}' in page


def test_numbers_agree_with_each_other(small):
  rows, _ = small
  caches = dict(seed=1, btx=1, bam_shared_kv=1, bam_kv=4)  # of keys and values
  budget = rows['btx']['budget_flops']
  assert rows['btx']['matched_tokens'] == rows['btx']['tokens'] == 95_367 * 2**20
  assert rows['bam_kv']['matched_tokens'] < rows['bam_shared_kv']['matched_tokens']
  for run, row in rows.items():
    for key in ('parameters', 'active_parameters', 'forward_flops', 'training_flops'):
      assert sum(row[key][part] for part in accounting.PARTS) == row[key]['total']
    for part, flops in row['layer_forward_flops'].items():
      assert 6 * flops == row['forward_flops'][part]
    flops = row['training_flops']['total']
    assert flops == 3 * row['forward_flops']['total']
    assert row['matched_tokens'] * flops <= budget < (row['matched_tokens'] + 1) * flops
    assert row['matched_steps'] == row['matched_tokens'] // 2**20
    layers, itemsize = 6, 2
    assert row['cache_bytes'] == caches.get(run, 1) * layers * 2 * 1024 * itemsize
    # Devices sum to the whole, but for norms, routers and a counter, which every device has.
    count, devices, held = row['parameters'], row['devices'], row['bytes_per_device']
    everywhere = count['norms'] + count['routers']
    whole = 4 * (count['total'] - everywhere)
    assert (held['parameters'] - 4 * everywhere) * devices == whole
    assert (held['optimizer'] - 8 * everywhere - 4) * devices == 2 * whole


@pytest.mark.parametrize('sizes', [(1, 1, 1, 1), (2, 1, 2, 2)])
def test_bytes_per_device_are_those_of_a_state_on_the_devices(model, sizes):
  mesh, settings = config.Mesh(*sizes), (config.Compute(), config.Optimizer())
  expected = accounting.state_bytes(model, *settings, mesh)
  abstract = step.abstract_state(model, *settings, sharding.make_mesh(mesh))
  state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), abstract)
  for part, tree in (('parameters', state.params), ('optimizer', state.opt_state)):
    held = collections.Counter()
    for shard in (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards):
      held[shard.device] += shard.data.nbytes
    assert len(held) == mesh.size and set(held.values()) == {expected[part]}
  assert expected['gradients'] == expected['parameters']
  assert expected['total'] == sum(v for k, v in expected.items() if k != 'total')


def test_gathered_weights_are_counted_from_the_arrays(model):
  """Whole but for what `tensor` cuts, and experts that stay elsewhere; one layer's, or all."""
  mesh, compute = config.Mesh(1, 2, 2, 2), config.Compute(dtype='bfloat16')
  abstract = transformer.Network(model, compute).abstract()['blocks']
  total = 0
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
    path = f'blocks/{sharding.path_of(key_path)}'
    if not path.endswith(('scale', 'router')):
      stay = sharding.has_experts(path, leaf.ndim)
      stay = stay and ('ffn' in path or model.soft_attention)
      total += 2 * leaf.size // (4 if stay else 2)  # devices
  none = dataclasses.replace(compute, remat='none')
  assert accounting.gathered_bytes(model, none, mesh) == total
  assert accounting.gathered_bytes(model, compute, mesh) == total // model.num_layers
  assert accounting.gathered_bytes(model, none, config.Mesh(data=2, tensor=2)) == 0


@pytest.mark.parametrize('recipe, flag, sentence', [
  ('nowhere.py', '--run=', '--config=nowhere.py cannot be read'),
  ('configs/quickstart.py', '--against=moe', '--against=moe is not in'),
  ('configs/quickstart.py', '--context=0', 'context'),
])  # fmt: skip
def test_a_mistake_is_one_sentence_and_status_2(server, recipe, flag, sentence):
  server.run('account', f'--config={recipe}', flag, folder=ROOT).refused(sentence)


def test_help_names_every_key(recipe_dict, command_doc):
  facts = accounting.account(config.parse(recipe_dict), against='btx')
  words = set(re.findall(r'\w+', command_doc('account')))
  assert facts.keys() <= words
  for row in facts['rows']:
    assert row.keys() <= words
    assert all(value.keys() <= words for key, value in row.items()
               if isinstance(value, dict) and key != 'mesh')  # fmt: skip
