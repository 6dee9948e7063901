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
from bam_jax.upcycle import routers, sources
from tests.model import oracle
from tests.upcycle import memory

KEY = jax.random.key(5)
PATHS = ('blocks/attention/router', 'blocks/ffn/router')


def upcycle(**changes) -> config.Upcycle:
  options = dict(num_experts=5, router_init='centroids') | changes
  return config.Upcycle(('seed', 'code', 'law'), 'bam_kv_experts', **options)


def tokens(seed: int = 0) -> list[np.ndarray]:
  """What two layers read of three sources, NLD; what all share is larger than what they do not."""
  rng = np.random.default_rng(seed)
  mean_SLD = 3 * rng.normal(size=(1, 2, 32)) + rng.normal(size=(3, 2, 32))
  mixing_DD = rng.normal(size=(32, 32))  # some directions vary more than others
  counts = (400, 70, 200)
  return [m + rng.normal(size=(n, 2, 32)) @ mixing_DD / 4 for m, n in zip(mean_SLD, counts)]


def moments(seed: int = 0) -> routers.Moments:
  of_sources = tokens(seed)
  grams = [np.einsum('nld,nle->lde', x_NLD, x_NLD) / len(x_NLD) for x_NLD in of_sources]
  return routers.Moments(np.stack([x_NLD.mean(0) for x_NLD in of_sources]), sum(grams) / 3)


def columns(path: str = PATHS[0], key: jax.Array = KEY, **changes) -> np.ndarray:
  return routers.columns(moments(), path, upcycle(**changes), key)


def test_centroids_against_numpy():
  mean_SLD, router = moments().mean_SLD, columns(router_scale=2.0)
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


@pytest.mark.parametrize('layer', range(2))
def test_ridge_against_least_squares(layer):
  """Of rows weighted so that sources count alike, with the penalty as rows of its own."""
  of_sources = [x_NLD[:, layer] for x_NLD in tokens()]
  rows, targets = [], []
  for source, x_ND in enumerate(of_sources):
    weight = 1 / np.sqrt(3 * len(x_ND))
    rows.append(weight * x_ND)
    targets.append(weight * np.tile(np.eye(3)[source] - 1 / 3, (len(x_ND), 1)))
  square = np.mean([np.mean(x_ND**2) for x_ND in of_sources])
  rows.append(np.sqrt(routers.RIDGE * square) * np.eye(32))
  want_DS, *_ = np.linalg.lstsq(np.concatenate(rows), np.concatenate([*targets, np.zeros((32, 3))]))
  logits_SS = np.stack([x_ND.mean(0) @ want_DS for x_ND in of_sources])
  others = (logits_SS.sum(0) - np.diag(logits_SS)) / 2
  want_DS *= 4 / np.mean(np.diag(logits_SS) - others)
  got_DE = columns(router_init='ridge', router_scale=4.0)[layer]
  np.testing.assert_allclose(got_DE[:, :3], want_DS, rtol=1e-4, atol=1e-5)


def test_copies_lie_beside_the_first_and_share_its_tokens():
  router = columns()
  for copy in (3, 4):
    cosine = np.sum(router[..., 0] * router[..., copy], axis=1)
    # A random direction is not square to the column: the turn is about COPY_SPREAD, not exactly.
    assert ((cosine < 1 - 1e-3) & (cosine > 1 - routers.COPY_SPREAD**2)).all()
  for init in ('centroids', 'ridge'):
    router = columns(router_init=init)
    winners = (tokens()[0][:, 0] @ router[0])[:, [0, 3, 4]].argmax(1)
    assert (np.bincount(winners, minlength=3) > 40).all()
    for other in (
      columns(PATHS[1], router_init=init), columns(key=jax.random.key(6), router_init=init)
    ):  # fmt: skip
      np.testing.assert_array_equal(other[..., :3], router[..., :3])
      assert (other[..., 3:] != router[..., 3:]).all()


def test_sources_that_cannot_be_told_apart_are_refused():
  same = moments()._replace(mean_SLD=np.ones((3, 2, 32)))
  with pytest.raises(UserError, match="router_init='ridge' finds no.*router_init='random'"):
    routers.columns(same, PATHS[0], upcycle(router_init='ridge'), KEY)


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
  found = routers.moments(network, placed, [batches], mesh, upcycle())
  assert np.array_equal(found.attention.mean_SLD, found.ffn.mean_SLD) == (block == 'parallel')
  [got] = found.attention.mean_SLD
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


@pytest.mark.parametrize('read', ['token', 'prefix'])
def test_moments_of_a_mixture_of_sequential_blocks(models, make_batch, monkeypatch, read):
  """Against what the oracle's routers are called with, on a mesh that splits experts."""
  model = dataclasses.replace(models['bam_kv_experts'], block='sequential', router_input=read)
  mesh = sharding.make_mesh(config.Mesh(data=2, expert=2, tensor=2))
  network = transformer.Network(model, config.Compute(), mesh)
  params = jax.tree.map(lambda x: 2 * np.asarray(x), network.init(jax.random.key(0)))
  batches = [make_batch(4, 8, seed) | {'domains': np.zeros(4, np.int32)} for seed in range(3)]
  placed = jax.device_put(params, sharding.tree(params, mesh))
  ridge = upcycle(router_init='ridge', router_input=read)
  found = routers.moments(network, placed, [batches[:1], batches[1:]], mesh, ridge)
  seen = {'attention': [], 'ffn': []}
  for part, inputs in seen.items():
    compute = getattr(oracle, part)
    record = lambda w, model, y_BTD, *rest, inputs=inputs, compute=compute: (
      inputs.append(y_BTD) or compute(w, model, y_BTD, *rest)
    )
    monkeypatch.setattr(oracle, part, record)
  wide = jax.tree.map(lambda x: x.astype(np.float64), params)
  for batch in batches:
    oracle.forward(wide, model, batch['tokens'], batch['segments'], batch['positions'])
  for part, inputs in seen.items():
    got, layers = getattr(found, part), model.num_layers
    for layer in range(layers):
      read_by = [
        oracle.read_by_router(model, y_BTD, batch['segments'])[batch['segments'].ravel() > 0]
        for y_BTD, batch in zip(inputs[layer::layers], batches)
      ]
      of_sources = read_by[0], np.concatenate(read_by[1:])
      means = [x_ND.mean(0) for x_ND in of_sources]
      np.testing.assert_allclose(got.mean_SLD[:, layer], means, rtol=1e-4, atol=1e-5)
      gram = sum(x_ND.T @ x_ND / len(x_ND) for x_ND in of_sources) / 2
      np.testing.assert_allclose(got.gram_LDD[layer], gram, rtol=1e-4, atol=1e-5)


@pytest.fixture
def initial(recipe_dict, dataset, tmp_path, monkeypatch):
  """The function (run, mesh) -> (node, initial parameters), from sources that are untrained."""
  monkeypatch.setattr(routers, 'FIT_TOKENS', 512)
  monkeypatch.setattr(checkpoint, 'find', lambda path: path)
  monkeypatch.setattr(integrity, 'check', lambda *_: None)
  recipe_dict['runs']['seed']['data'] = {'general': 1.0}
  opened = lambda path: untrained(config.parse(recipe_dict).model, path)
  monkeypatch.setattr(sources, 'open_checkpoint', opened)
  monkeypatch.setattr(sources, 'check_alike', lambda *_: None)

  def make(name: str, mesh: dict | None = None, block: str = 'parallel', **options):
    recipe_dict['runs'][name]['init']['upcycle'] |= {'router_init': 'centroids', **options}
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
  'name, block, options',
  [
    pytest.param('btx', 'parallel', {}, marks=pytest.mark.slow),
    ('bam', 'parallel', {}),
    ('bam', 'sequential', dict(router_init='ridge', router_input='prefix', embedding_rank=2)),
  ],
)
def test_domains_go_to_their_own_experts_before_any_training(
  initial, dataset, name, block, options
):
  made = initial(name, block=block, **options)
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
  if made.node.model.embedding_rank:  # whose router reads what the first layer's attention reads
    first_DE = made.params['blocks']['attention']['router'][0]
    np.testing.assert_array_equal(made.params['embed']['router'], first_DE)


@pytest.mark.parametrize('init', ['centroids', 'ridge'])
def test_a_mesh_changes_nothing_and_one_router_is_like_the_other(initial, init):
  one = memory.flat(initial('bam', router_init=init).params)
  other = memory.flat(initial('bam', {'data': 2, 'fsdp': 4}, router_init=init).params)
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
