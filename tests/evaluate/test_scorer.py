"""Scores are the oracle's, and the same to the last bit whatever they are computed beside."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from bam_jax import config
from bam_jax.data import mixture
from bam_jax.errors import UserError
from bam_jax.evaluate import scorer as scorer_lib
from bam_jax.evaluate.scorer import Scorer
from bam_jax.parallel import sharding
from bam_jax.train import step
from tests.evaluate.folders import LENGTH, write_checkpoint
from tests.model import oracle

MESHES = {'data': (8, 1, 1, 1), 'all': (2, 2, 2, 1), 'fsdp': (1, 4, 1, 1), 'tensor': (1, 1, 2, 4)}
FAST = 'untied', 'bam_kv_experts'  # all parts of the model
OTHERS = 'dense', 'btx', 'bam_shared_kv', 'routed_attention'
slow = lambda names: [pytest.param(name, marks=pytest.mark.slow) for name in names]


def of_oracle(model, params, tokens):
  """Log-likelihoods of tokens[1:], whether each is the most probable one, and the routes."""
  read = np.asarray(tokens[:-1], int)[None]
  double = oracle.map_leaves(lambda x: np.asarray(x, np.float64), params)
  logits, routes = oracle.forward(
    double, model, read, np.ones_like(read), np.arange(read.shape[1])[None]
  )
  logits, target = logits[0], np.asarray(tokens[1:], int)
  picked = logits[np.arange(len(target)), target]
  return picked - oracle.logsumexp(logits), logits.argmax(-1) == target, routes


@pytest.mark.parametrize('name', [*FAST, *slow(OTHERS)])
def test_windows_are_scored_as_the_oracle_has_them(name, models, saved, start, pieces):
  model, scorer = models[name], Scorer(saved(name))
  some = pieces[:4]
  results = dict(scorer.score(some, routing=True))
  assert sorted(results) == [0, 1, 2, 3]
  for number, window in enumerate(some):
    scored = slice(window.first - 1, None)
    likely, greedy, routes = of_oracle(model, start(name), window.tokens)
    result = results[number]
    np.testing.assert_allclose(-result.nll, likely[scored], rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(result.greedy, greedy[scored])
    for router, routed in result.routing.items():
      of_layers = [route for route in routes if route.kind == router]
      assert len(of_layers) == model.num_layers
      for layer, route in enumerate(of_layers):
        gates = route.probabilities_NE[scored]
        np.testing.assert_allclose(routed.gate_LTE[layer], gates, atol=1e-5)
        load = np.zeros_like(gates)
        for token, chosen in enumerate(route.choices_NC[scored]):
          load[token, chosen] = 1 / len(chosen)
        want = load if route.top_k else gates
        np.testing.assert_allclose(routed.load_LTE[layer], want, atol=1e-5)
    routers = [model.attention_experts, model.ffn_experts]
    assert len(result.routing) == sum(section is not None for section in routers)


def exact(scorer, pieces, routing=False):
  """Everything that comes out, to be compared bit for bit."""
  results = dict(scorer.score(pieces, routing))
  return [np.concatenate([results[i].nll, results[i].greedy]) for i in range(len(pieces))]


@pytest.fixture(scope='module')
def alone(saved, pieces):
  """The function (name, dtype) -> scores of every window by itself, on one device."""

  @functools.cache
  def make(name, dtype='float32'):
    scorer = Scorer(saved(name), dtype)
    return [exact(scorer, [window])[0] for window in pieces]

  return make


@pytest.mark.parametrize('shape', ['data', 'all', *slow(['tensor', 'fsdp'])])
def test_no_mesh_changes_a_bit(saved, pieces, alone, shape):
  mesh = config.Mesh(*MESHES[shape])
  found = exact(Scorer(saved('bam_kv_experts'), 'float32', mesh), pieces)
  for a, b in zip(found, alone('bam_kv_experts')):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize('name, dtype, shape', [
  *((name, 'float32', 'all') for name in ('untied', *OTHERS)),
  *(('routed_attention', 'bfloat16', shape) for shape in MESHES),
])  # fmt: skip
def test_no_model_changes_a_bit(saved, pieces, alone, name, dtype, shape):
  found = exact(Scorer(saved(name), dtype, config.Mesh(*MESHES[shape])), pieces, routing=True)
  for a, b in zip(found, alone(name, dtype)):
    np.testing.assert_array_equal(a, b)


def test_bfloat16_is_near(saved, pieces, alone):
  low = exact(Scorer(saved('bam_kv_experts'), 'bfloat16'), pieces)
  total = [sum(x[: len(x) // 2].sum() for x in scores) for scores in (low, alone('bam_kv_experts'))]
  assert total[0] != total[1]
  np.testing.assert_allclose(*total, rtol=1e-2)


def test_weights_are_cut(saved):
  scorer = Scorer(saved('btx'), 'bfloat16', config.Mesh(data=2, fsdp=2, expert=2))
  assert dict(scorer._mesh.shape) == {'data': 2, 'fsdp': 4, 'expert': 1, 'tensor': 1}
  up = scorer._params['blocks']['ffn']['up']
  assert up.addressable_shards[0].data.size * 4 == up.size and up.dtype == 'bfloat16'
  assert scorer._params['blocks']['ffn']['router'].dtype == 'float32'
  with pytest.raises(UserError, match=r'--mesh splits .* into 3 parts'):
    Scorer(saved('dense'), mesh=config.Mesh(fsdp=3))


def test_groups_of_an_accelerator(saved, pieces, alone, monkeypatch):
  """Rows beside each other: near what they are alone, and exact whatever the mesh."""
  monkeypatch.setattr(scorer_lib, 'GROUP_TOKENS', 4 * LENGTH)
  found = []
  for mesh in (config.Mesh(), config.Mesh(data=2, fsdp=2)):
    scorer = Scorer(saved('bam_kv_experts'), 'float32', mesh)
    scorer._platform = 'gpu'
    found.append(exact(scorer, pieces))
  for a, b, single in zip(*found, alone('bam_kv_experts')):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(a, single, rtol=1e-5, atol=2e-5)


@pytest.fixture(scope='module')
def tight(models, start, dataset, tmp_path_factory) -> tuple[config.Model, str]:
  """BTX with a capacity that drops tokens in training: the model and a checkpoint."""
  experts = dataclasses.replace(models['btx'].ffn_experts, capacity_factor=1.0)
  model = dataclasses.replace(models['btx'], ffn_experts=experts)
  folder = tmp_path_factory.mktemp('capacity') / 'tight'
  return model, str(write_checkpoint(folder, model, start('btx'), dataset.tokenizer()))


def test_documents_are_what_training_holds_out(tight, start, dataset):
  """Whole documents in one long sequence, as a run's report packs them; neither drops a token."""
  documents = dataset.documents('code', 'valid')
  (batch,) = mixture.heldout(documents, sequence_length=documents.num_tokens, batch_size=1)
  mesh = sharding.make_mesh(config.Mesh())
  evaluate = step.evaluation_step(tight[0], config.Compute(), mesh)
  sums = jax.device_get(evaluate(start('btx'), sharding.put_batch(batch, mesh)))
  pieces = [w for tokens in documents for w in scorer_lib.cut(tokens, 256, 256)]
  scored = [result for _, result in Scorer(tight[1], length=256).score(pieces)]
  assert sum(len(result.nll) for result in scored) == int(sums.targets.sum())
  np.testing.assert_allclose(sum(r.nll.sum() for r in scored), sums.nll.sum(), rtol=1e-5)


def test_a_capacity_drops_nothing_here(tight, saved, pieces):
  found, wanted = (exact(Scorer(path), pieces[:5]) for path in (tight[1], saved('btx')))
  for a, b in zip(found, wanted):
    np.testing.assert_array_equal(a, b)


def test_loglikelihoods(models, saved, start):
  rng = np.random.default_rng(0)
  model, params = models['bam_kv_experts'], start('bam_kv_experts')
  sizes = [(1, 1), (5, 3), (20, 5), (40, 7), (3, LENGTH), (9, LENGTH + 6)]
  requests = [(rng.integers(0, 320, n).tolist(), rng.integers(0, 320, m).tolist())
              for n, m in sizes]  # fmt: skip
  # One whose continuation is what the model would say.
  context = requests[1][0]
  said = []
  for _ in range(3):
    here = [*context, *said]
    logits, _ = oracle.forward(
      oracle.map_leaves(np.float64, params), model, np.array([here]), np.ones((1, len(here)), int),
      np.arange(len(here))[None],
    )  # fmt: skip
    said.append(int(logits[0, -1].argmax()))
  requests.append((context, said))
  found = Scorer(saved('bam_kv_experts')).loglikelihoods(requests)
  for (context, continuation), (total, greedy) in zip(requests, found):
    tokens, room = [*context, *continuation], LENGTH + 1
    if len(continuation) <= LENGTH:
      likely, best, _ = of_oracle(model, params, tokens[-room:])
      likely, best = likely[-len(continuation) :], best[-len(continuation) :]
    else:  # blocks, the first from the last token of the context
      tokens = tokens[len(context) - 1 :]
      parts = [of_oracle(model, params, tokens[at : at + room]) for at in (0, LENGTH)]
      likely, best = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    assert len(likely) == len(continuation)
    np.testing.assert_allclose(total, likely.sum(), rtol=1e-5, atol=2e-5)
    assert greedy == best.all()
  assert found[-1][1] and not found[3][1]
  with pytest.raises(ValueError, match='Request 1 has no context'):
    Scorer(saved('dense')).loglikelihoods([([1], [2]), ([], [2])])
