"""Mixtures with other experts: to the byte, against NumPy, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from bam_jax import checkpoint, config
from bam_jax.config import strict
from bam_jax.convert import writing
from bam_jax.errors import UserError
from bam_jax.model import transformer
from bam_jax.upcycle import growth, merge, outputs
from bam_jax.upcycle.sources import open_checkpoint
from tests.model import oracle
from tests.upcycle.memory import NAMES, draw, save, values
from tests.upcycle.test_merge import close, logits

KEY = merge.run_key(0, '')
OPTIONS = {
  'folded': ('bam_kv_experts', dict(norms='fold')),
  'bfloat16': ('bam_shared_kv', dict(norms='fold', expert_bias=True)),
  'two a token': ('btx', dict(top_k=2, expert_bias=True)),
}


@pytest.fixture(scope='module')
def runs(models, tmp_path_factory):
  """Three dense runs: seed, code and law."""
  folder = tmp_path_factory.mktemp('runs')
  for number, name in enumerate(NAMES):
    save(folder / name, draw(models['untied'], number), models['untied'])
  return folder


def mix(runs, output, method='bam_kv_experts', names=NAMES[:2], dtype='float32', **changes):
  """A mixture of some of the runs, opened."""
  how = config.Upcycle(tuple(str(runs / name) for name in names), method, **changes)
  opened = [open_checkpoint(path) for path in how.sources]
  writing.to_checkpoint(output, opened, how, 3, '', dtype, 'convert', lambda *_: None)
  return open_checkpoint(str(output))


def write(output, changed):
  """A mixture with other experts as a checkpoint, opened."""
  writing.copy_to_checkpoint(output, changed, 0, 'the command', lambda *_: None)
  return open_checkpoint(str(output))


def same(one: dict, other: dict, paths=None) -> None:
  assert one.keys() == other.keys()
  for path in paths or one:
    np.testing.assert_array_equal(one[path], other[path], err_msg=path, strict=True)


@pytest.mark.parametrize('case', OPTIONS)
def test_adding_and_dropping_gives_the_same_bytes(runs, tmp_path, case):
  """And in between its experts are those of a mixture of all three."""
  method, options = OPTIONS[case]
  options = options | {'dtype': case if case == 'bfloat16' else 'float32'}
  mixture = mix(runs, tmp_path / 'mix', method, **options)
  law = open_checkpoint(str(runs / 'law'))
  grown = write(tmp_path / 'grown', growth.add(mixture, law, KEY))
  before, after = values(tmp_path / 'mix'), values(tmp_path / 'grown')
  three = mix(runs, tmp_path / 'three', method, NAMES, **options)
  assert grown.meta.model == three.meta.model and grown.meta.sources == NAMES
  stacked = {path for path, x in before.items() if x.shape[1:2] == (2,) and x.ndim > 2}
  assert len(stacked) == {'bam_kv_experts': 7, 'bam_shared_kv': 5, 'btx': 3}[method]
  same(after, values(tmp_path / 'three'), stacked)
  columns = {path for path in before if path.endswith(('router', 'expert_bias'))}
  same({path: after[path][..., :2] for path in columns}, {path: before[path] for path in columns})
  same(before, after, before.keys() - stacked - columns)
  for path in columns:
    new = after[path][..., 2]
    if path.endswith('bias'):
      assert not new.any()
    else:  # as random as a router: columns are of length 1, about
      assert new.any() and 0.5 < np.linalg.norm(new.astype(np.float32), axis=1).mean() < 2
  dropped = write(tmp_path / 'dropped', growth.drop(grown, ['law']))
  same(values(tmp_path / 'dropped'), before)
  assert dropped.meta.model == mixture.meta.model and dropped.meta.sources == NAMES[:2]


def test_a_replaced_expert_leaves_its_columns_to_the_new_one(runs, tmp_path):
  mixture, law = mix(runs, tmp_path / 'mix', expert_bias=True), open_checkpoint(str(runs / 'law'))
  replaced = growth.replace(mixture, law, 'seed')
  other = mix(runs, tmp_path / 'other', names=('law', 'code'), expert_bias=True)
  assert replaced.meta.sources == other.meta.sources
  for path, (shape, _) in mixture.reader.specs.items():
    stacked = shape[1:2] == (2,) and len(shape) > 2
    want = (other if stacked else mixture).reader.read(path)
    np.testing.assert_array_equal(replaced.reader.read(path), want, err_msg=path, strict=True)


def test_what_a_changed_mixture_says_of_itself(runs, tmp_path):
  mixture = mix(runs, tmp_path / 'mix')
  grown = write(tmp_path / 'grown', growth.add(mixture, open_checkpoint(str(runs / 'law')), KEY))
  meta = write(tmp_path / 'less', growth.drop(grown, ['0'])).meta
  assert (meta.run, meta.step, meta.method, meta.sources) == (
    'less', 0, 'bam_kv_experts', ('code', 'law'),
  )  # fmt: skip
  assert strict.from_dict(checkpoint.Meta, strict.to_dict(meta), 'meta') == meta
  record = meta.manifest
  assert record.command == 'the command'
  assert [source.run for source in record.sources] == ['grown']
  assert (record.grown.experts, record.grown.names) == ((1, 2), NAMES)
  earlier = record.grown.manifest
  assert [source.run for source in earlier.sources] == ['mix', 'law']
  assert (earlier.grown.experts, earlier.grown.names) == ((0, 1, growth.NEW), NAMES[:2])
  assert earlier.grown.manifest == mixture.meta.manifest
  assert record.upcycle == mixture.meta.manifest.upcycle  # how norms are folded, for the next one


def test_a_rotation_travels_with_its_expert(models, runs, tmp_path):
  model = dataclasses.replace(models['untied'], rope_theta=5e5)
  save(tmp_path / 'long', draw(model, 9), model, sequence_length=9)
  mixture, long = mix(runs, tmp_path / 'mix'), open_checkpoint(str(tmp_path / 'long'))
  grown = growth.add(mixture, long, KEY)
  own, other = config.Rope(1e4), config.Rope(5e5)
  assert grown.meta.model.attention_experts.ropes == (own, own, other)
  assert grown.meta.sequence_length == 9
  assert growth.drop(grown, ['seed']).meta.model.attention_experts.ropes == (own, other)
  assert growth.drop(grown, ['long']).meta.model == mixture.meta.model
  with pytest.raises(UserError, match='rope_theta: 10000.0 -> 500000.0'):
    growth.add(mix(runs, tmp_path / 'shared', 'bam_shared_kv'), long, KEY)


def tree(source) -> dict:
  """All arrays of an opened checkpoint, on a device."""
  abstract = transformer.Network(source.meta.model, config.Compute()).abstract()
  where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract)
  return jax.tree.map(np.array, outputs.read_to_mesh(source.reader, abstract, where))


@pytest.mark.parametrize('name', ['bam_kv_experts', 'bam_shared_kv', 'routed_attention'])
def test_without_an_expert_the_others_gates_are_renormalised(
  models, make_batch, tmp_path, monkeypatch, name
):
  """Against the oracle of the whole mixture, with its gates set to 0 after the softmax."""
  model, batch, choose = models[name], make_batch(2, 8), oracle.choose
  params = oracle.random_params(model, np.random.default_rng(0))
  single = oracle.map_leaves(lambda x: x.astype(np.float32), params)
  save(tmp_path / 'mix', single, model, sources=('a', 'b', 'c', 'b'))
  source = growth.open_without(str(tmp_path / 'mix'), ['a', '3'])
  assert source.meta.run == 'mix without a and 3' and source.meta.sources == ('b', 'c')

  def without(kind, router_DE, y_ND, top_k, *rest):
    route = choose(kind, router_DE, y_ND, top_k, *rest)
    gates_NE = route.probabilities_NE * [0, 1, 1, 0]
    gates_NE /= gates_NE.sum(-1, keepdims=True)
    choices_NC = np.argsort(-gates_NE, axis=-1)[:, : top_k or 4]
    return dataclasses.replace(route, probabilities_NE=gates_NE, choices_NC=choices_NC)

  monkeypatch.setattr(oracle, 'choose', without)
  where = batch['tokens'], batch['segments'], batch['positions']
  want_BTV, _ = oracle.forward(params, model, *where)
  close(logits(tree(source), source.meta.model, batch), want_BTV[batch['segments'] > 0])


def test_an_expert_that_no_router_chooses_changes_nothing(models, runs, make_batch, tmp_path):
  model, batch, shared = models['untied'], make_batch(2, 8), []
  for number, name in enumerate(NAMES):
    shared.append(draw(model, number))
    shared[-1]['embed']['table'][:, 0] = 100  # what all tokens share
    shared[-1]['blocks']['norm']['scale'][:] = 1
    for part, last in (('attention', 'out'), ('ffn', 'down')):
      shared[-1]['blocks'][part][last][..., 0] = 0
    save(tmp_path / name, shared[-1], model)
  mixture = mix(tmp_path, tmp_path / 'mix')
  grown = growth.add(mixture, open_checkpoint(str(tmp_path / 'law')), KEY, 'zero')
  params = tree(grown)
  for part in ('attention', 'ffn'):
    assert not params['blocks'][part]['router'][..., 2].any()
    params['blocks'][part]['router'][:, 0, 2] = -100
  got = logits(params, grown.meta.model, batch)
  want = logits(tree(mixture), mixture.meta.model, batch)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_draws(runs, tmp_path):
  """By the seed, the expert's name and its number; as long as the mixture's own."""
  mixture, path = mix(runs, tmp_path / 'mix'), 'blocks/ffn/router'
  law, other = (open_checkpoint(str(runs / 'law')) for _ in range(2))
  other = other._replace(meta=dataclasses.replace(other.meta, run='other'))
  column = lambda mixture, *how: growth.add(mixture, *how).reader.read(path)[..., -1]
  first = column(mixture, law, KEY)
  np.testing.assert_array_equal(column(mixture, law, KEY), first)
  scaled = mix(runs, tmp_path / 'scaled', router_scale=2.0)
  np.testing.assert_allclose(column(scaled, law, KEY), 2 * first, rtol=1e-6)
  three = growth.add(mixture, law, KEY)
  for draws in (
    column(mixture, law, merge.run_key(1, '')), column(mixture, other, KEY),
    column(three, other._replace(meta=law.meta, folder=tmp_path), KEY),
  ):  # fmt: skip
    assert (draws != first).all()


REFUSED = {
  'a dense mixture': ['code', 'is a dense model, without experts: name a mixture.'],
  'another mixture': ['two', 'is a mixture: only dense models can be mixed.'],
  'another model': ['odd', 'ffn_dim: 48 -> 64'],
  'no tokenizer': ['odd', 'lacks its tokenizer'],
  'the same again': ['same values as expert 1 (code) of', 'give another model'],
  'NaN': ['odd has nan', 'blocks/ffn/up[1, 30, 47]'],
  'an unknown name': ["no expert 'math'. Its experts are 0: seed, 1: code, 2: seed."],
  'a name that is there twice': ["several experts 'seed': give its number", '2: seed'],
  'too few': ['keep 1 of its 3 experts', 'two or more: drop fewer'],
  'embeddings of experts': ['embedding_rank=2', 'all of its sources: mix'],
  'too few for top_k': ['keep 2 of its 3 experts', 'its FFN chooses top_k=3', 'smaller top_k'],
}


@pytest.mark.parametrize('case, words', REFUSED.items(), ids=REFUSED)
def test_what_is_refused(models, runs, tmp_path, case, words):
  top_k = 3 if case == 'too few for top_k' else 1
  rank = 2 if case == 'embeddings of experts' else 0
  options = dict(norms='fold', top_k=top_k, embedding_rank=rank)
  mixture = mix(runs, tmp_path / 'mix', num_experts=3, **options)
  model, facts = models['untied'], {}
  if case == 'another model':
    model = dataclasses.replace(model, ffn_dim=64)
  if case == 'no tokenizer':
    facts = {'tokenizer_hash': 'ab'}
  params = draw(model, 5)
  if case == 'NaN':
    params['blocks']['ffn']['up'][1, 30, 47] = np.nan
  save(tmp_path / 'odd', params, model, **facts)
  dense = runs / 'code' if case == 'the same again' else tmp_path / 'odd'
  if case == 'another mixture':
    mix(runs, tmp_path / 'two', 'btx')
    dense = tmp_path / 'two'
  dropped = {
    'an unknown name': ['math'], 'a name that is there twice': ['seed'],
    'too few': ['1', '2'], 'too few for top_k': ['code'],
  }.get(case)  # fmt: skip
  before = {path.name for path in tmp_path.iterdir()}
  with pytest.raises(UserError) as caught:
    if dropped:
      growth.drop(mixture, dropped)
    else:
      mixture = open_checkpoint(str(runs / 'code')) if case == 'a dense mixture' else mixture
      grown = growth.add(mixture, open_checkpoint(str(dense)), KEY)
      growth.check_new(mixture, grown)
      write(tmp_path / 'output', grown)
  message = str(caught.value)
  assert '\n' not in message and message.endswith('.')
  assert all(word in message for word in words), message
  assert {path.name for path in tmp_path.iterdir()} == before
