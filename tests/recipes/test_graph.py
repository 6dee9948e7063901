"""The graph of runs: its order, what a run's identity is made of, and what is refused unstarted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays, integrity
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.model import arithmetic
from bam_jax.parallel import memory
from bam_jax.recipes import graph
from tests.upcycle.memory import META


def resolve(recipe: dict, data_hash: str = '') -> dict[str, graph.Node]:
  return graph.resolve(config.parse(recipe), data_hash)


def test_every_run_comes_after_those_it_starts_from(recipe_dict):
  runs = recipe_dict['runs']
  recipe_dict['runs'] = {name: runs[name] for name in ('btx', 'law', 'bam', 'code', 'seed')}
  # Among the orders that are possible, the one closest to the recipe's.
  assert list(resolve(recipe_dict)) == ['seed', 'law', 'code', 'btx', 'bam']


@pytest.mark.parametrize('name, init, words', [
  ('seed', {'run': 'law'}, ['config.runs has a cycle', 'seed', 'law']),
  ('seed', {'run': 'seed'}, ['config.runs has a cycle: seed <- seed.']),
  (
    'bam', {'upcycle': {'from': ['seed', 'btx'], 'method': 'btx'}},
    ['config.runs.bam.init.upcycle.from', "'btx', which is a mixture"],
  ),
  (
    'bam', {'upcycle': {'from': ['seed', 'code', 'law'], 'method': 'btx', 'top_k': 4}},
    ['config.runs.bam.init.upcycle', 'top_k=4', 'num_experts=3'],
  ),
])  # fmt: skip
def test_graphs_that_are_refused(recipe_dict, name, init, words):
  recipe_dict['runs'][name]['init'] = init
  with pytest.raises(UserError) as caught:
    resolve(recipe_dict)
  assert all(word in str(caught.value) for word in words), caught.value


@pytest.fixture
def write(tmp_path, models):
  """The function (name, facts of its `meta`) -> path of a checkpoint without arrays."""

  def write(name: str, **changes) -> str:
    folder = epath.Path(tmp_path / name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    facts = META | {'model': models['dense'], 'run': name, 'tokenizer_hash': 'ab', 'versions': {}}
    checkpoint.write_meta(folder, checkpoint.Meta(**facts | changes))
    return str(folder)

  return write


def test_what_starts_from_a_mixture_is_a_mixture(recipe_dict, write, models):
  runs, names = recipe_dict['runs'], ('a', 'b', 'c', 'a')
  bam = write('bam', model=models['bam_kv_experts'], method='bam_kv_experts', sources=names)
  dense = write('dense', method='average', sources=('a', 'b'))
  for name, init in {
    'more': {'run': 'btx'}, 'from_bam': {'checkpoint': bam}, 'from_dense': {'checkpoint': dense},
  }.items():  # fmt: skip
    runs[name] = {**runs['code'], 'init': init}
  soup = {'from': ['code', 'law'], 'method': 'average'}
  runs['soup'] = {**runs['btx'], 'init': {'upcycle': soup}}
  nodes = resolve(recipe_dict)
  assert {name: (node.kind, node.method, node.experts) for name, node in nodes.items()} == {
    'seed': ('seed', None, ()),
    'code': ('specialist', None, ()),
    'law': ('specialist', None, ()),
    'btx': ('mixture', 'btx', ('seed', 'code', 'law')),
    'bam': ('mixture', 'bam_kv_experts', ('seed', 'code', 'law')),
    'more': ('mixture', 'btx', ('seed', 'code', 'law')),
    'from_bam': ('mixture', 'bam_kv_experts', names),
    'from_dense': ('seed', None, ()),
    'soup': ('mixture', 'average', ('code', 'law')),
  }


def test_a_checkpoint_is_known_by_what_it_is(recipe_dict, write):
  """By its step, its record and its files' checksums, and not by where it lies."""
  recipe_dict['runs']['seed']['init'] = {'checkpoint': write('one')}
  before = digests(recipe_dict)
  moved = Path(write('one')).rename(Path(write('other')).with_name('moved'))
  recipe_dict['runs']['seed']['init'] = {'checkpoint': str(moved)}
  assert digests(recipe_dict) == before
  for changes in (dict(step=2), dict(run='other'), dict(versions={'jax': '0.12'})):
    recipe_dict['runs']['seed']['init'] = {'checkpoint': write('one', **changes)}
    assert not digests(recipe_dict).items() & before.items(), 'nor is any run that comes from it'
  path = Path(write('one'))
  (path / 'params').mkdir()
  (path / 'params/values').write_text('other values')
  integrity.write(path, path / 'checksums')
  recipe_dict['runs']['seed']['init'] = {'checkpoint': str(path)}
  assert not digests(recipe_dict).items() & before.items()


def test_without_checksums_a_checkpoint_is_known_by_its_files(recipe_dict, write, tmp_path):
  """Those of a bucket have none, nor have copies of them."""
  found = []
  for value in (0, 1):
    path, specs = epath.Path(write('one')), {'x': arrays.Spec((2, 3), np.dtype(np.float32))}
    with arrays.Writer(path / 'params', specs) as writer:
      writer.write('x', (), np.full((2, 3), value, np.float32))
    shutil.rmtree(path / 'checksums')
    for place in (path, shutil.copytree(path, tmp_path / f'copy{value}')):
      recipe_dict['runs']['seed']['init'] = {'checkpoint': str(place)}
      found.append(digests(recipe_dict)['seed'])
  assert found[0] == found[1] != found[2] == found[3]


def digests(recipe: dict, data_hash: str = '') -> dict[str, str]:
  return {name: graph.digest(node.identity) for name, node in resolve(recipe, data_hash).items()}


def changed(recipe: dict, change, data_hash: str = '') -> set[str]:
  """Names of the runs whose identity a change of the recipe changes."""
  before = digests(recipe)
  change(recipe)
  after = digests(recipe, data_hash)
  return {name for name in before if before[name] != after[name]}


EVERY = {'seed', 'code', 'law', 'btx', 'bam'}
MIXTURES = {'btx', 'bam'}


def set_run(name: str, **values):
  return lambda recipe: recipe['runs'][name].update(values)


def set_group(group: str, **values):
  return lambda recipe: recipe[group].update(values)


EXPERTS_SWAPPED = {'upcycle': {'from': ['seed', 'law', 'code'], 'method': 'btx'}}
CHANGES = {
  'label': (set_run('seed', label='other'), set()),
  'where the data lies': (set_group('data', path='/elsewhere'), set()),
  'a bound on steps that cuts nothing': (lambda recipe: recipe.update(steps=100), set()),
  'model': (set_group('model', norm_epsilon=1e-4), EVERY),
  "a specialist's data": (set_run('code', data={'code': 1.0}), {'code'} | MIXTURES),
  "a mixture's batch": (set_run('btx', batch_size=16), {'btx'}),
  'how a run is computed': (
    set_run('seed', compute=dict(remat='full', loss_chunk=7, unroll=2)),
    set(),
  ),
  'its dtype': (set_run('seed', compute={'dtype': 'bfloat16'}), EVERY),
  "a dense run's micro-batches": (set_run('seed', grad_accum_steps=2), set()),
  "a mixture's, which its router losses are over": (set_run('btx', grad_accum_steps=2), {'btx'}),
  'the order of the experts': (set_run('btx', init=EXPERTS_SWAPPED), {'btx'}),
}


@pytest.mark.parametrize('change, whose', CHANGES.values(), ids=CHANGES)
def test_identity_changes_exactly_when_it_should(recipe_dict, change, whose):
  assert changed(recipe_dict, change) == whose


def test_the_data_is_part_of_the_identity(recipe_dict):
  assert changed(recipe_dict, lambda recipe: None, 'other data') == EVERY


def check(recipe: dict, dataset, asked=('seed',)) -> tuple[str, ...]:
  parsed = config.parse(recipe)
  return graph.check(parsed, graph.resolve(parsed), dataset, asked)


def test_a_recipe_that_fits_passes(recipe_dict, dataset):
  assert check(recipe_dict, dataset, tuple(EVERY)) == ('code', 'general', 'law', 'math')
  recipe_dict['evaluation']['domains'] = ['math', 'code']
  assert check(recipe_dict, dataset) == ('math', 'code')


MISFITS = {
  'domain': (
    set_run('seed', data={'poetry': 1.0}),
    ['runs.seed.data', 'general, law, math'],
  ),
  'vocabulary': (set_group('model', vocab_size=312), ['vocab_size=312', 'raise it to 320']),
  'batch': (set_group('evaluation', batch_size=6), ['evaluation.batch_size=6', '4 parts']),
  'dimension': (set_group('model', ffn_dim=50), ['runs.seed.mesh', 'blocks/ffn/down', '4 parts']),
}
PARAMETERS = 1000 * 1000  # of a model of nobody's, so that bytes can be counted by hand
# A token: 2 layers x 24 channels x 2 bytes, and 320 logits of 4 bytes; 3 of 4 copies of the state.
STATE, BATCH = 12 * PARAMETERS, {'batch_size': 80_000}
ROOM = [
  ({}, 'gradients and optimizer', 16 * PARAMETERS),
  (BATCH | {'loss_chunk': 1000}, 'runs.seed.batch', STATE + 1_280_000 * 96 + 1000 * 1280),
  ({'evaluation': 80_000}, 'config.evaluation.batch_size', STATE + 1_280_000 * (48 + 1280)),
]


@pytest.mark.parametrize('sizes, key, least', ROOM)
def test_the_least_memory_by_hand(recipe_dict, dataset, monkeypatch, sizes, key, least):
  monkeypatch.setattr(
    arithmetic, 'parameters', lambda model: arithmetic.Parameters(PARAMETERS, PARAMETERS)
  )
  recipe_dict['model'] |= {'d_model': 24, 'num_layers': 2}
  run = recipe_dict['runs']['seed']
  run |= {'tokens': 10**9, 'batch_size': sizes.get('batch_size', run['batch_size'])}
  run['compute'] = {'dtype': 'bfloat16', 'loss_chunk': sizes.get('loss_chunk', 0)}
  recipe_dict['evaluation']['batch_size'] = sizes.get('evaluation', 8)
  monkeypatch.setattr(memory, 'free_bytes', lambda: least)
  check(recipe_dict, dataset)
  monkeypatch.setattr(memory, 'free_bytes', lambda: least - 1)
  with pytest.raises(UserError, match='are free') as caught:
    check(recipe_dict, dataset)
  assert key in str(caught.value)


def test_a_checkpoint_of_another_tokenizer_is_refused(recipe_dict, dataset, write):
  for name in ('seed', 'code', 'law'):
    recipe_dict['runs'][name]['init'] = {'checkpoint': write('one')}
  with pytest.raises(UserError, match='/one.* lacks its tokenizer'):
    check(recipe_dict, dataset)
  folder = Path(recipe_dict['runs']['law']['init']['checkpoint'])
  facts = json.loads((dataset.path / 'tokenizer.json').read_text())
  vocab = facts['model']['vocab']
  for swapped in (vocab, vocab | {'z': vocab['y'], 'y': vocab['z']}):
    facts['model']['vocab'] = swapped
    again = Tokenizer(json.dumps(facts).encode(), 'tokenizer.json')  # with other spaces
    assert again.hash != dataset.tokenizer_hash
    write('one', tokenizer_hash=again.hash, bos_token='<|bos|>', eos_token='<|eos|>')
    again.save(folder)
    if swapped is vocab:
      check(recipe_dict, dataset)
  with pytest.raises(UserError, match="/one was made with another tokenizer .*'z' in one"):
    check(recipe_dict, dataset)
  other = {'bos_token': '<|eos|>', 'eos_token': '<|eos|>'}  # of the very same file
  write('one', tokenizer_hash=dataset.tokenizer_hash, **other)
  dataset.tokenizer().save(folder)
  with pytest.raises(UserError, match='/one was made with another tokenizer .*bos_token is'):
    check(recipe_dict, dataset)


@pytest.mark.parametrize('change, words', MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused(recipe_dict, dataset, change, words):
  recipe_dict['runs']['seed']['mesh'] = {'fsdp': 4}
  change(recipe_dict)
  with pytest.raises(UserError) as caught:
    check(recipe_dict, dataset)
  for word in words:
    assert word in str(caught.value)
