"""What must be equal is: one network written as another, at sizes and batches that are awkward.

Two relatives live elsewhere: that a mixture merged from one model is that model, and that a router
which knows one expert gives that source's attention and FFN, in upcycle/test_merge.py; that
bfloat16 is within bounds of float32, and agreement with the oracle, in
model/test_oracle_agreement.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bam_jax import config
from bam_jax.model import ffn as ffn_lib
from bam_jax.model import router, transformer
from bam_jax.model.rope import Tokens
from bam_jax.parallel.collectives import Layout
from tests.model import oracle
from tests.model.test_oracle_agreement import attention, distance, ffn, make_batch
from tests.model.test_oracle_agreement import model as sized

BOUND = 1e-5  # float32: a few dozen roundings of the largest value
DENSE = {
  'gqa': sized(num_heads=4, num_kv_heads=2),
  'one_head': sized(num_heads=1, head_dim=6, tied_embeddings=False),
}
SLOW = pytest.mark.slow
CASES = [  # odd lengths; padding; 3 tokens
  ('gqa', 'mixed'),
  pytest.param('one_head', 'long', marks=SLOW),
  pytest.param('gqa', 'short', marks=SLOW),
]
EXPERTS = 5  # more than the tokens of 'short'


def question(model: config.Model, rows: str) -> tuple[dict, dict]:
  rng = np.random.default_rng([*rows.encode()])
  params = oracle.random_params(model, rng)
  return oracle.map_leaves(lambda x: x.astype(np.float32), params), make_batch(rows, rng)


def mixture(dense: config.Model, **parts) -> config.Model:
  return config.Model(**{**vars(dense), **parts})


def layer(params: dict, part: str, number: int) -> dict:
  return jax.tree.map(lambda x: jnp.asarray(x[number]), params['blocks'][part])


def call(cls, params: dict, *inputs) -> np.ndarray:
  """One layer of an attention or FFN module, with these parameters."""

  @jax.jit
  def run(params):
    graph, state = nnx.split(cls(rngs=nnx.Rngs(0)))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(*inputs)[0]

  return np.asarray(run(params))


@functools.cache
def program(model: config.Model):
  network = transformer.Network(model, config.Compute())

  def run(params, tokens, segments, positions):
    hidden_BTD, routing = network.hidden(params, tokens, segments, positions)
    return network.logits(params, hidden_BTD), routing

  return jax.jit(run)


def logits(params: dict, model: config.Model, batch: dict) -> np.ndarray:
  got, _ = program(model)(params, batch['tokens'], batch['segments'], batch['positions'])
  return np.asarray(got)[batch['segments'] > 0]


def with_part(params: dict, part: str, **arrays) -> dict:
  return params | {'blocks': params['blocks'] | {part: params['blocks'][part] | arrays}}


def copied(dense: dict, model: config.Model, seed: int = 0) -> dict:
  """Dense parameters in every expert of a mixture, and random routers."""
  rng = np.random.default_rng(seed)
  for part, experts in (('attention', model.attention_experts), ('ffn', model.ffn_experts)):
    if experts is None:
      continue
    N, shared = experts.num_experts, getattr(experts, 'shared_kv', False)
    arrays = {
      name: x if shared and name in ('key', 'value') else np.stack([x] * N, axis=1)
      for name, x in dense['blocks'][part].items()
    }
    arrays['router'] = rng.normal(size=(2, model.d_model, N)).astype(np.float32)
    dense = with_part(dense, part, **arrays)
  return dense


@pytest.mark.parametrize('name, rows', CASES)
@pytest.mark.parametrize(
  'parts',
  [
    attention(EXPERTS) | ffn(EXPERTS, renormalize=True),
    attention(EXPERTS, shared_kv=True) | ffn(EXPERTS, top_k=2, renormalize=True),
    attention(3, top_k=2, renormalize=True) | ffn(3, top_k=3),
  ],
  ids=['kv_experts', 'shared_kv', 'routed'],
)
def test_equal_experts_are_the_dense_model(name, rows, parts):
  params, batch = question(DENSE[name], rows)
  model = mixture(DENSE[name], **parts)
  want = logits(params, DENSE[name], batch)
  assert distance(logits(copied(params, model), model, batch), want) < BOUND


@pytest.mark.parametrize('k', [1, 2])
def test_without_renormalising_gates_scale_the_ffn(k):
  dense = DENSE['gqa']
  params, _ = question(dense, 'short')
  model = mixture(dense, **ffn(EXPERTS, top_k=k))
  mixed = layer(copied(params, model), 'ffn', 0)
  y_BTD = np.random.default_rng(0).normal(size=(1, 3, 5)).astype(np.float32)
  tokens = Tokens(np.ones((1, 3), np.int32), np.arange(3)[None], None, None)
  gates_BTE, *_ = router.gates(model, jnp.asarray(y_BTD), mixed['router'], tokens)
  scale_BT = np.sort(gates_BTE)[..., -k:].sum(-1, keepdims=True)
  want = scale_BT * call(
    functools.partial(ffn_lib.FFN, dense, Layout()), layer(params, 'ffn', 0), y_BTD, tokens
  )
  assert scale_BT.max() < 0.99
  experts = functools.partial(ffn_lib.MixtureOfFFN, model, Layout())
  assert distance(call(experts, mixed, y_BTD, tokens), want) < BOUND


@pytest.mark.parametrize('expert', [0, 3])
def test_all_tokens_to_one_expert_is_that_expert(expert):
  dense, parts = DENSE['gqa'], attention(4, top_k=1, renormalize=True) | ffn(4, renormalize=True)
  model = mixture(dense, **parts)
  params, batch = question(model, 'mixed')
  # One feature is by far the largest of every token, in every layer: a router can read it.
  params['embed']['table'][:, 0] += 40
  alone = params
  for part in ('attention', 'ffn'):
    force = np.zeros((2, 5, 4), np.float32)
    force[:, 0, expert] = 9 * np.sign(params['blocks']['norm']['scale'][:, 0])
    arrays = params['blocks'][part]
    params = with_part(params, part, router=force)
    own = {name: x[:, expert] for name, x in arrays.items() if name != 'router'}
    alone = alone | {'blocks': alone['blocks'] | {part: own}}
  _, routing = program(model)(params, batch['tokens'], batch['segments'], batch['positions'])
  for stats in routing:
    np.testing.assert_array_equal(stats.load[:, expert], stats.tokens)
  assert distance(logits(params, model, batch), logits(alone, dense, batch)) < BOUND


@pytest.mark.parametrize('name, rows', CASES[:2])
def test_shared_keys_and_values_are_equal_keys_and_values(name, rows):
  shared = mixture(DENSE[name], **attention(3, shared_kv=True), **ffn(3))
  owned = mixture(DENSE[name], **attention(3), **ffn(3))
  params, batch = question(shared, rows)
  attend = params['blocks']['attention']
  repeated = {k: np.stack([attend[k]] * 3, axis=1) for k in ('key', 'value')}
  want = logits(params, shared, batch)
  assert distance(logits(with_part(params, 'attention', **repeated), owned, batch), want) < BOUND
  repeated['key'][:, 1] *= 1.5
  got = logits(with_part(params, 'attention', **repeated), owned, batch)
  assert distance(got, want) > 10 * BOUND


@pytest.mark.parametrize('name, rows', CASES)
@pytest.mark.parametrize('top_k', [0, 2])
def test_the_order_of_experts_means_nothing(name, rows, top_k):
  model = mixture(DENSE[name], **attention(4, top_k=top_k), **ffn(EXPERTS, top_k=2))
  params, batch = question(model, rows)
  moved, half_moved = params, params
  for part, order in (('attention', [2, 0, 3, 1]), ('ffn', [4, 2, 0, 1, 3])):
    arrays = {
      key: x[:, :, order] if key == 'router' else x[:, order]
      for key, x in params['blocks'][part].items()
    }
    moved = with_part(moved, part, **arrays)
    half_moved = with_part(half_moved, part, router=arrays['router'])
  want = logits(params, model, batch)
  assert distance(logits(moved, model, batch), want) < BOUND
  assert distance(logits(half_moved, model, batch), want) > 100 * BOUND


@pytest.mark.parametrize('name, rows', CASES[:2])
@pytest.mark.parametrize('shared_kv', [False, True])
def test_visiting_all_the_experts_is_soft_routing(name, rows, shared_kv):
  options = dict(shared_kv=shared_kv)
  soft = mixture(DENSE[name], **attention(3, **options), **ffn(3, top_k=3))
  params, batch = question(soft, rows)
  want = logits(params, soft, batch)
  for renormalize in (False, True):  # N gates sum to 1 anyway
    routed = mixture(
      DENSE[name],
      **attention(3, top_k=3, renormalize=renormalize, **options),
      **ffn(3, top_k=3, renormalize=renormalize),
    )
    assert distance(logits(params, routed, batch), want) < BOUND


@pytest.mark.parametrize(
  'parts',
  [
    pytest.param({}, id='dense', marks=SLOW),
    pytest.param(attention(3) | ffn(3), id='kv_experts'),
    pytest.param(attention(2, shared_kv=True) | ffn(4, top_k=2), id='shared_kv', marks=SLOW),
    pytest.param(attention(3, top_k=1) | ffn(3), id='routed', marks=SLOW),
  ],
)
def test_no_position_sees_the_future_or_another_document(parts):
  # Every token is a word of its own, and the output is not tied: the gradient with respect to the
  # table is the gradient with respect to each input embedding.
  rows = 'mixed'
  segments = make_batch(rows, np.random.default_rng(0))['segments']
  B, T = segments.shape
  model = sized(num_heads=4, num_kv_heads=2, tied_embeddings=False, vocab_size=B * T, **parts)
  params, batch = question(model, rows)
  tokens_BT = np.arange(B * T, dtype=np.int32).reshape(B, T)
  network = transformer.Network(model, config.Compute())
  weights_V = np.random.default_rng(1).normal(size=B * T).astype(np.float32)

  def scores(table):
    replaced = params | {'embed': {'table': table}}
    hidden_BTD, _ = network.hidden(replaced, tokens_BT, segments, batch['positions'])
    return (network.logits(replaced, hidden_BTD) @ weights_V).reshape(-1)

  jacobian = jax.jit(jax.jacrev(scores))(params['embed']['table'])
  reached = np.asarray(jnp.any(jacobian != 0, axis=-1))
  row, place = np.divmod(np.arange(B * T), T)
  document = segments.reshape(-1)
  visible = (
    (row[:, None] == row)
    & (place[:, None] >= place)
    & (document[:, None] == document)
    & (document > 0)
  )
  real = document > 0
  np.testing.assert_array_equal(reached[real], visible[real])
