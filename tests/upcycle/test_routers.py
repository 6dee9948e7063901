"""Routers from the sources' data: against NumPy, and from a recipe by where the tokens go."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from bam_jax import checkpoint, config
from bam_jax.checkpoint import integrity
from bam_jax.errors import UserError
from bam_jax.model import transformer
from bam_jax.parallel import sharding
from bam_jax.recipes import graph, start
from bam_jax.train import loop
from bam_jax.upcycle import centroids, sources
from tests.model import oracle
from tests.upcycle import memory

KEY = jax.random.key(5)
PATHS = ('blocks/attention/router', 'blocks/ffn/router')


def upcycle(**changes) -> config.Upcycle:
  options = dict(num_experts=5, router_init='centroids') | changes
  return config.Upcycle(('seed', 'code', 'law'), 'bam_kv_experts', **options)


def means(seed: int = 0) -> np.ndarray:
  """Three sources, two layers; what the sources share is larger than what they do not."""
  rng = np.random.default_rng(seed)
  return 3 * rng.normal(size=(1, 2, 32)) + rng.normal(size=(3, 2, 32))


def test_columns_against_numpy():
  mean_SLD, router = means(), centroids.columns(means(), PATHS[0], upcycle(router_scale=2.0), KEY)
  assert router.shape == (2, 32, 5) and router.dtype == np.float32
  for layer in range(2):
    common = mean_SLD[:, layer].mean(0)
    for expert in range(3):
      away = mean_SLD[expert, layer] - common
      away = away - (away @ common) / (common @ common) * common
      want = 2 * away / np.sqrt(away @ away)
      np.testing.assert_allclose(router[layer, :, expert], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(common @ router[layer], 0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(router[layer], axis=0), 2, rtol=1e-6)


def test_columns_of_copies_lie_beside_the_first_and_share_its_tokens():
  router = centroids.columns(means(), PATHS[0], upcycle(), KEY)
  for copy in (3, 4):
    cosine = np.sum(router[..., 0] * router[..., copy], axis=1)
    # A random direction is not square to the column: the turn is about COPY_SPREAD, not exactly.
    assert ((cosine < 1 - 1e-3) & (cosine > 1 - centroids.COPY_SPREAD**2)).all()
  rng = np.random.default_rng(1)
  tokens = means()[0, 0] + rng.normal(size=(4000, 32))
  winners = (tokens @ router[0])[:, [0, 3, 4]].argmax(1)
  assert (np.bincount(winners, minlength=3) > 400).all()
  for other in (
    centroids.columns(means(), PATHS[1], upcycle(), KEY),
    centroids.columns(means(), PATHS[0], upcycle(), jax.random.key(6)),
  ):
    np.testing.assert_array_equal(other[..., :3], router[..., :3])
    assert (other[..., 3:] != router[..., 3:]).all()


def test_sources_that_cannot_be_told_apart_are_refused():
  same = np.repeat(means()[:1], 3, axis=0)
  with pytest.raises(UserError, match="router_init='random'"):
    centroids.columns(same, PATHS[0], upcycle(), KEY)


@pytest.mark.parametrize('block', ['parallel', 'sequential'])
def test_inputs_of_the_first_block_and_of_the_second(models, make_batch, block):
  """Against the embedding's norm in NumPy, and the hidden states of a model one layer deep."""
  model = dataclasses.replace(models['dense'], block=block)
  mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
  network = transformer.Network(model, config.Compute(), mesh)
  params = jax.tree.map(np.asarray, network.init(jax.random.key(0)))
  scales = params['blocks']['norm']['scale'] = memory.draw(model, 3)['blocks']['norm']['scale'] + 1
  batches = [make_batch(8, 16, seed) | {'domains': np.zeros(8, np.int32)} for seed in range(2)]
  placed = jax.device_put(params, sharding.tree(params, mesh))
  means = centroids.mean_inputs(network, placed, [batches], mesh)
  assert np.array_equal(*means) == (block == 'parallel')
  [got] = means.attention
  real = [batch['segments'] > 0 for batch in batches]
  mean = lambda states: np.concatenate([x[mask] for x, mask in zip(states, real)]).mean(0)

  x = [params['embed']['table'][batch['tokens']].astype(np.float64) for batch in batches]
  norm = lambda x: (
    (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + model.norm_epsilon)
  )
  np.testing.assert_allclose(got[0], mean([norm(x) * scales[0] for x in x]), rtol=1e-4, atol=1e-5)

  # The final norm of a model of the first block sees what the second block's norm sees.
  short = transformer.Network(dataclasses.replace(model, num_layers=1), config.Compute())
  cut = params | {'blocks': jax.tree.map(lambda x: x[:1], params['blocks'])}
  cut['final_norm'] = {'scale': scales[1]}
  hidden = jax.jit(short.hidden)
  states = [np.asarray(hidden(cut, b['tokens'], b['segments'], b['positions'])[0]) for b in batches]
  np.testing.assert_allclose(got[1], mean(states), rtol=1e-4, atol=1e-5)


def test_inputs_of_a_mixture_of_sequential_blocks(models, make_batch, monkeypatch):
  """Against what the oracle's attention and FFN are called with, on a mesh that splits experts."""
  model = dataclasses.replace(models['bam_kv_experts'], block='sequential')
  mesh = sharding.make_mesh(config.Mesh(data=2, expert=2, tensor=2))
  network = transformer.Network(model, config.Compute(), mesh)
  params = jax.tree.map(lambda x: 2 * np.asarray(x), network.init(jax.random.key(0)))
  batch = make_batch(4, 8) | {'domains': np.zeros(4, np.int32)}
  placed = jax.device_put(params, sharding.tree(params, mesh))
  means = centroids.mean_inputs(network, placed, [[batch]], mesh)
  read = {'attention': [], 'ffn': []}
  for part, seen in read.items():
    compute = getattr(oracle, part)
    record = lambda w, model, y_BTD, *rest, seen=seen, compute=compute: (
      seen.append(y_BTD[batch['segments'] > 0].mean(0)) or compute(w, model, y_BTD, *rest)
    )
    monkeypatch.setattr(oracle, part, record)
  wide = jax.tree.map(lambda x: x.astype(np.float64), params)
  oracle.forward(wide, model, batch['tokens'], batch['segments'], batch['positions'])
  for part, seen in read.items():
    np.testing.assert_allclose(getattr(means, part)[0], seen, rtol=1e-4, atol=1e-5)


@pytest.fixture
def initial(recipe_dict, dataset, tmp_path, monkeypatch):
  """The function (run, mesh) -> (node, initial parameters), from sources that are untrained."""
  monkeypatch.setattr(centroids, 'CENTROID_TOKENS', 512)
  monkeypatch.setattr(checkpoint, 'find', lambda path: path)
  monkeypatch.setattr(integrity, 'check', lambda *_: None)
  recipe_dict['runs']['seed']['data'] = {'general': 1.0}
  opened = lambda path: untrained(config.parse(recipe_dict).model, path)
  monkeypatch.setattr(sources, 'open_checkpoint', opened)
  monkeypatch.setattr(sources, 'check_alike', lambda *_: None)

  def make(name: str, mesh: dict | None = None, block: str = 'parallel'):
    recipe_dict['runs'][name]['init']['upcycle'] |= {'router_init': 'centroids'}
    recipe_dict['runs'][name]['mesh'] = mesh or {}
    recipe_dict['model']['block'] = block
    parsed = config.parse(recipe_dict)
    nodes = graph.resolve(parsed)
    made = sharding.make_mesh(nodes[name].run.mesh)
    shardings = sharding.tree(memory.abstract(nodes[name].model), made)
    with jax.set_mesh(made):
      params = start.initial_params(parsed, nodes, nodes[name], tmp_path, dataset, shardings)
    return types.SimpleNamespace(recipe=parsed, node=nodes[name], params=params)

  return make


def untrained(model: config.Model, path: str) -> sources.Source:
  """Stands in for a trained source: what all share, and a little of its own."""
  own = memory.draw(model, ord(path[-1]))
  params = jax.tree.map(lambda x, y: x + 0.1 * y, memory.draw(model, 0), own)
  for norm in model.norms:
    params['blocks'][norm]['scale'] = np.ones_like(params['blocks'][norm]['scale'])
  return memory.source(model, params, path)


@pytest.mark.parametrize(
  'name, block',
  [
    pytest.param('btx', 'parallel', marks=pytest.mark.slow),
    ('bam', 'parallel'),
    ('bam', 'sequential'),
  ],
)
def test_domains_go_to_their_own_experts_before_any_training(initial, dataset, name, block):
  made = initial(name, block=block)
  network = transformer.Network(made.node.model, made.node.run.compute)
  hidden = jax.jit(network.hidden)
  for expert, domain in enumerate(['general', 'code', 'law']):
    run = dataclasses.replace(made.node.run, data={domain: 1.0}, data_seed=9)
    batch = loop.batches_of(run, made.recipe, dataset)[0]
    _, routing = hidden(made.params, batch['tokens'], batch['segments'], batch['positions'])
    for stats in routing:
      if stats is not None:
        share = np.asarray(stats.load.sum(0) / stats.tokens.sum())
        assert share.argmax() == expert and share[expert] > 0.4, (domain, share)


def test_a_mesh_changes_nothing_and_one_router_is_like_the_other(initial):
  one = memory.flat(initial('bam').params)
  other = memory.flat(initial('bam', {'data': 2, 'fsdp': 4}).params)
  for path in PATHS:
    np.testing.assert_allclose(one[path], other[path], rtol=0, atol=1e-4)
  np.testing.assert_array_equal(one[PATHS[0]], one[PATHS[1]])


def test_data_of_sources_is_checked_before_any_training(recipe_dict, dataset):
  recipe_dict['runs']['law']['data'] = {'poetry': 1.0}
  parsed = config.parse(recipe_dict)
  graph.check(parsed, graph.resolve(parsed), dataset, ['btx'])
  recipe_dict['runs']['btx']['init']['upcycle']['router_init'] = 'centroids'
  parsed = config.parse(recipe_dict)
  with pytest.raises(UserError, match='config.runs.law.data names the domain .poetry.'):
    graph.check(parsed, graph.resolve(parsed), dataset, ['btx'])
