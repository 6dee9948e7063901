"""The JAX model is the oracle: logits, loss and every element of the gradient, in two precisions.

In float64 the bound leaves room for nothing but rounding, so that a term that is small, an epsilon
in the wrong place or a wrong tie cannot hide; float32 is what runs. Cases are small and awkward,
and no matmul here is worth optimising: compiling is what these tests spend their time on.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest

from bam_jax import config
from bam_jax.model import transformer
from bam_jax.model.kernels import grouped
from bam_jax.train import loss
from tests.model import oracle

# Of the largest magnitude in each array that is compared.
TOLERANCE = {'float32': 5e-5, 'float64': 1e-12}
FLOAT64 = config.Compute(dtype='float64')  # not for users; nothing checks it in a dataclass
FLOAT32 = config.Compute()
# Weights of the routers' losses that no gradient can hide behind.
LOSS = config.Loss(load_balance=0.3, router_z=0.2)


def model(**changes) -> config.Model:
  """Sizes that differ wherever they can; an epsilon and a theta that a tiny model feels."""
  sizes = dict(
    vocab_size=7, d_model=5, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2, ffn_dim=3,
    rope_theta=20.0, norm_epsilon=1e-2,
  )  # fmt: skip
  return config.Model(**{**sizes, **changes})


def attention(num_experts: int, **changes) -> dict:
  return {'attention_experts': config.AttentionExperts(num_experts, **changes)}


def ffn(num_experts: int, **changes) -> dict:
  return {'ffn_experts': config.FFNExperts(num_experts, **changes)}


ROWS = {
  # Three rows of odd length: several documents in a row, a padded tail, one document.
  'mixed': [[1, 1, 2, 3, 3], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
  'full': [[1, 1, 1, 2, 2], [1, 2, 2, 2, 2], [1, 1, 1, 1, 1]],
  'long': [[1, 1, 1, 2, 2, 2, 0]],
  'short': [[1, 1, 1]],
}


def make_batch(rows: str, rng: np.random.Generator) -> dict:
  segments_BT = np.array(ROWS[rows], np.int32)
  positions_BT = np.zeros_like(segments_BT)
  for b, t in np.ndindex(segments_BT.shape):
    if t and segments_BT[b, t] == segments_BT[b, t - 1]:
      positions_BT[b, t] = positions_BT[b, t - 1] + 1
  weights_BT = rng.choice([0.0, 0.5, 1.0], segments_BT.shape, p=[0.2, 0.3, 0.5])
  weights_BT[0, 0] = 1
  return {
    'tokens': rng.integers(0, 7, segments_BT.shape).astype(np.int32),
    'targets': rng.integers(0, 7, segments_BT.shape).astype(np.int32),
    'segments': segments_BT,
    'positions': positions_BT,
    'weights': (weights_BT * (segments_BT > 0)).astype(np.float32),
  }


def force(expert: int) -> Callable[[dict], None]:
  """Sends every token to one FFN expert: a feature that all tokens share decides."""

  def change(params):
    params['embed']['table'][:, 0] += 4
    params['blocks']['ffn']['router'][:, 0, expert] += 4

  return change


def tie(params: dict) -> None:
  """All FFN gates equal."""
  params['blocks']['ffn']['router'][...] = 0


@dataclass(frozen=True)
class Case:
  """A model, a batch, and what makes them awkward."""

  model: config.Model
  rows: str = 'mixed'
  change: Callable[[dict], None] = lambda params: None
  # What the routes of the oracle must show, lest the case test nothing.
  shows: Callable[[list[oracle.Route]], bool] = lambda routes: True


def spread(routes: list[oracle.Route]) -> bool:
  """Every top-k router uses more experts than one token visits."""
  return all(len(np.unique(r.choices_NC)) > r.top_k for r in routes if r.top_k)


def only(*experts: int) -> Callable[[list[oracle.Route]], bool]:
  return lambda routes: all(set(r.choices_NC.flat) == {*experts} for r in routes)


def closest(routes: list[oracle.Route]) -> float:
  """The smallest gap between the last gate that is chosen and the first that is not."""
  gaps = [1.0]
  for route in routes:
    k = route.top_k
    if 0 < k < route.logits_NE.shape[1]:
      gates_NE = np.sort(route.probabilities_NE, axis=-1)[:, ::-1]
      gaps.append((gates_NE[:, k - 1] - gates_NE[:, k]).min())
  return min(gaps)


def drops(routes: list[oracle.Route]) -> bool:
  return any(r.dropped > 0 for r in routes)


MHA = dict(num_kv_heads=2, head_dim=4)
GQA = dict(num_heads=4, num_kv_heads=2)
# The fields of other families than the paper's, each once, and in pairs where they meet.
SEQUENTIAL = dict(block='sequential', norm='rmsnorm', rotary_layout='half')
NEOX = dict(
  block='parallel_two_norms', norm='layernorm_bias', rotary_layout='half', biases='all', ffn='gelu'
)
WINDOWS = dict(layer_types=('sliding', 'full'), window=2)
LINEAR = config.RopeScaling('linear', 3.0)
LLAMA3 = config.RopeScaling('llama3', 4.0, 16, low=0.3, high=1.5)
YARN = config.RopeScaling('yarn', 4.0, 32, beta_fast=2.0, beta_slow=0.5)
CASES = {
  'dense_mha': Case(model(**MHA)),
  'dense_gqa': Case(model(**GQA, head_dim=4)),
  'one_head': Case(model(num_heads=1, head_dim=6), 'long'),
  'untied': Case(model(tied_embeddings=False, head_dim=4)),
  'dense_qk_norm': Case(model(**GQA, head_dim=4, qk_norm='head_layernorm', logit_scale=0.4)),
  'sequential': Case(model(**SEQUENTIAL, **GQA, head_dim=4), 'long'),
  'sequential_with_biases': Case(
    model(**SEQUENTIAL, **GQA, qk_norm='head_rms', biases='attention', **attention(2), **ffn(3))
  ),
  'norms_of_sums': Case(
    model(**SEQUENTIAL, **MHA, norm_place='post', qk_norm='all_rms', **attention(2), **ffn(2))
  ),
  'windows': Case(
    model(**GQA, **WINDOWS, nope_layers=(1,), residual_scale=0.7, **attention(2), **ffn(2)), 'long'
  ),
  'thetas_of_windows': Case(
    model(**SEQUENTIAL, **WINDOWS, head_dim=8, window_rope_theta=5.0, rope_scaling=YARN), 'long'
  ),
  'factors': Case(
    model(
      **SEQUENTIAL,
      num_heads=2,
      head_dim=6,
      biases='qkv',
      rotary_dim=4,
      rope_scaling=LLAMA3,
      attention_scale=0.7,
      embedding_scale=1.5,
      residual_scale=0.6,
      **attention(2, shared_kv=True),
      **ffn(2),
    ),
    'long',
  ),
  'ropes_of_experts': Case(
    model(
      **SEQUENTIAL,
      **WINDOWS,
      head_dim=8,
      nope_layers=(1,),
      rope_scaling=YARN,
      **attention(3, ropes=(config.Rope(20.0, YARN), config.Rope(3.0), config.Rope(9.0, LINEAR))),
      **ffn(2),
    ),
    'long',
  ),
  'two_norms': Case(
    model(**NEOX, **MHA, rotary_dim=2, tied_embeddings=False, **attention(2), **ffn(3, top_k=2))
  ),
  'two_norms_dense': Case(model(**NEOX, **MHA), 'long'),
  'caps': Case(
    model(
      **SEQUENTIAL | dict(norm='rmsnorm_plus_one', norm_place='both', ffn='geglu_tanh'),
      **GQA,
      **WINDOWS,
      qk_norm='head_rms',
      attention_scale=0.7,
      embedding_scale=1.5,
      attention_cap=0.8,
      logit_cap=1.5,
      **ffn(2),
    ),
    'long',
  ),
  'biases_of_what_is_dropped': Case(
    model(
      **SEQUENTIAL, biases='all', **attention(2, shared_kv=True), **ffn(3, capacity_factor=1.0)
    ),
    'full',
    shows=drops,
  ),
  'linear_scaling': Case(model(rope_scaling=LINEAR, head_dim=4, **ffn(2)), 'short'),
  'bam_kv_experts': Case(model(**GQA, **attention(2), **ffn(3)), shows=spread),
  'bam_shared_kv': Case(model(**MHA, **attention(3, shared_kv=True), **ffn(2, top_k=2)), 'long'),
  'bam_kv_experts_qk_norm': Case(model(**MHA, qk_norm='head_layernorm', **attention(2), **ffn(2))),
  'bam_shared_kv_qk_norm': Case(
    model(**MHA, qk_norm='head_layernorm', **attention(2, shared_kv=True), **ffn(2)), 'long'
  ),
  'attention_experts_alone': Case(model(**attention(2))),
  'btx_top_1': Case(model(**ffn(4)), shows=spread),
  'btx_top_2': Case(model(**ffn(4, top_k=2)), shows=spread),
  'btx_top_3_of_6': Case(model(**ffn(6, top_k=3)), 'long', shows=spread),
  'renormalised_top_1': Case(model(**ffn(4, renormalize=True)), shows=spread),
  'renormalised_top_2': Case(model(**ffn(4, top_k=2, renormalize=True)), shows=spread),
  'more_experts_than_tokens': Case(model(**attention(2), **ffn(5)), 'short'),
  'one_expert': Case(model(**attention(1), **ffn(1)), 'long'),
  'routed_attention_top_1': Case(model(**attention(2, top_k=1), **ffn(2)), shows=spread),
  'routed_attention_top_2': Case(
    model(**attention(3, top_k=2, shared_kv=True), **ffn(3, top_k=2)), shows=spread
  ),
  'routed_attention_renormalised': Case(
    model(**attention(3, top_k=2, renormalize=True), **ffn(2)), 'long', shows=spread
  ),
  'prefix': Case(
    model(**GQA, router_input='prefix', **attention(3, top_k=2), **ffn(3)), shows=spread
  ),
  'prefix_sequential': Case(
    model(**SEQUENTIAL, router_input='prefix', router_memory=3, **attention(2), **ffn(3, top_k=2)),
    'long',
  ),
  'embedding_experts': Case(
    model(
      **GQA,
      d_model=16,
      num_layers=1,
      embedding_rank=2,
      embedding_scale=1.5,
      router_input='prefix',
      **ffn(3, top_k=2),
    ),
    shows=spread,
  ),
  'embedding_experts_untied': Case(
    model(
      **SEQUENTIAL,
      d_model=16,
      num_layers=1,
      embedding_rank=2,
      tied_embeddings=False,
      norm_place='post',
      **attention(2),
      **ffn(3, top_k=2, renormalize=True),
    ),
    'long',
  ),
  'all_to_one_expert': Case(model(**ffn(4)), change=force(2), shows=only(2)),
  'equal_gates': Case(model(**ffn(4, top_k=2)), change=tie, shows=only(0, 1)),
  'dropping': Case(model(**ffn(3, capacity_factor=1.0)), 'full', shows=drops),
  'dropping_beside_padding': Case(model(**ffn(3, capacity_factor=1.0)), shows=drops),
  'dropping_all_but_a_few': Case(
    model(**ffn(3, capacity_factor=1.0)), change=force(1), shows=drops
  ),
  'dropping_top_2_of_3': Case(
    model(**ffn(3, top_k=2, renormalize=True, capacity_factor=1.05)), 'full', shows=drops
  ),
  'roomy_buffer': Case(
    model(**ffn(3, capacity_factor=3.0)), 'full', shows=lambda routes: not drops(routes)
  ),
}
AS_USERS_RUNS = {
  'xla_backend_optimization_level': 3, 'xla_llvm_disable_expensive_passes': False
}  # fmt: skip
# One of each kind of layer; the others are slow tests.
QUICK = {
  'float64': (
    'dense_qk_norm',
    'untied',
    'sequential_with_biases',
    'windows',
    'thetas_of_windows',
    'factors',
    'two_norms',
    'caps',
    'bam_kv_experts',
    'btx_top_3_of_6',
    'routed_attention_top_2',
    'prefix',
    'embedding_experts',
    'dropping_beside_padding',
  ),
  'float32': ('bam_kv_experts',),
}
# What float32 could get wrong alone is the casts: of norms, routers, caps and sums.
OF_FLOAT32 = (
  'bam_kv_experts', 'sequential_with_biases', 'caps', 'two_norms', 'btx_top_2',
  'dropping_top_2_of_3', 'routed_attention_top_2', 'prefix_sequential',
)  # fmt: skip


def cases(dtype: str) -> list:
  names = CASES if dtype == 'float64' else OF_FLOAT32
  return [pytest.param(n, marks=() if n in QUICK[dtype] else pytest.mark.slow) for n in names]


@dataclass(frozen=True)
class Answer:
  """Logits at real positions, the loss, what is measured, and the loss's gradient by path."""

  logits: np.ndarray
  loss: float
  measured: dict[str, Any]  # sums of the batch, and `ffn/load` and so on with a leading axis L
  slopes: dict[str, np.ndarray]


@functools.cache
def question(name: str) -> tuple[dict, dict]:
  """Parameters, exact in float32, and a batch; treat both as read-only."""
  case = CASES[name]
  rng = np.random.default_rng([*name.encode()])  # a new case leaves the others' draws alone
  params = oracle.random_params(case.model, rng)
  case.change(params)
  params = oracle.map_leaves(lambda x: x.astype(np.float32), params)
  return params, make_batch(case.rows, rng)


@functools.cache
def expected(name: str) -> Answer:
  """The oracle's answer, computed once for all the precisions."""
  case = CASES[name]
  params, batch = question(name)
  params = oracle.map_leaves(lambda x: x.astype(np.float64), params)
  logits_BTV, routes = oracle.forward(
    params, case.model, batch['tokens'], batch['segments'], batch['positions']
  )
  assert case.shows(routes), 'this draw does not show what the case is for'
  # Exact ties are a rule to be tested; near ones would let the rounding of float32 decide.
  assert case.change is tie or closest(routes) > 1e-4
  fn = lambda params: oracle.loss(params, case.model, LOSS, batch)
  return Answer(
    logits_BTV[batch['segments'] > 0],
    fn(params),
    measure(logits_BTV, routes, batch),
    oracle.leaves(oracle.gradient(fn, params)),
  )


def measure(logits_BTV: np.ndarray, routes: list[oracle.Route], batch: dict) -> dict:
  """What training logs: sums over the batch's targets, and over its real tokens in each layer."""
  nll_BT = oracle.logsumexp(logits_BTV) - np.take_along_axis(
    logits_BTV, batch['targets'][..., None], -1
  ).squeeze(-1)
  out = {'nll': (batch['weights'] * nll_BT).sum(), 'targets': np.count_nonzero(batch['weights'])}
  real_N = batch['segments'].ravel() > 0
  for kind in {route.kind for route in routes}:
    layers = []
    for route in routes:
      if route.kind != kind:
        continue
      p_RE = route.probabilities_NE[real_N]
      choices_R = route.choices_NC[real_N].ravel()
      count_E = np.bincount(choices_R, minlength=p_RE.shape[1])
      layers.append(
        {
          'tokens': real_N.sum(),
          'load': count_E if route.top_k else p_RE.sum(0),
          'gate': p_RE.sum(0),
          'z': (oracle.logsumexp(route.logits_NE[real_N]) ** 2).sum(),
          'entropy': -(p_RE * np.log(p_RE)).sum(),
          'dropped': route.dropped,
        }
      )
    out |= {f'{kind}/{key}': np.stack([layer[key] for layer in layers]) for key in layers[0]}
  return out


@functools.cache
def program(model: config.Model, compute: config.Compute) -> Callable:
  """The JAX model as training computes it, compiled: (params, batch) -> Answer."""
  network = transformer.Network(model, compute)
  objective = functools.partial(loss.objective, network, LOSS)

  def run(params, batch):
    hidden_BTD, _ = network.hidden(params, batch['tokens'], batch['segments'], batch['positions'])
    logits_BTV = network.logits(params, hidden_BTD)
    (value, metrics), slopes = jax.value_and_grad(objective, has_aux=True)(params, batch)
    return logits_BTV, value, metrics, slopes

  # Float64 is there to compare equations: compile it fast. The others compile as users' runs do.
  wide = compute.dtype == 'float64'
  options = None if wide else AS_USERS_RUNS
  compiled = jax.jit(run, compiler_options=options)

  def answer(params, batch):
    dtype = np.float64 if wide else np.float32
    with jax.enable_x64(wide):
      params = oracle.map_leaves(lambda x: x.astype(dtype), params)
      batch = {**batch, 'weights': batch['weights'].astype(dtype)}
      logits_BTV, value, metrics, slopes = jax.device_get(compiled(params, batch))
    assert logits_BTV.dtype == value.dtype == dtype
    assert all(x.dtype == dtype for x in oracle.leaves(slopes).values())
    measured = {'nll': metrics.nll, 'targets': metrics.targets}
    for kind, stats in metrics.routing._asdict().items():
      if stats is not None:
        measured |= {f'{kind}/{key}': x for key, x in stats._asdict().items()}
    return Answer(logits_BTV[batch['segments'] > 0], float(value), measured, oracle.leaves(slopes))

  return answer


@functools.cache
def answer(name: str, compute: config.Compute) -> Answer:
  return program(CASES[name].model, compute)(*question(name))


def distance(got, want) -> float:
  """The largest difference, relative to the largest magnitude of what is wanted."""
  scale = np.abs(want).max()
  return float(np.abs(np.asarray(got, np.float64) - want).max() / (scale if scale else 1))


def differences(got: Answer, want: Answer, tolerance: float) -> dict[str, float]:
  """What differs, and by how much."""
  found = {'logits': distance(got.logits, want.logits), 'loss': distance(got.loss, want.loss)}
  for part in ('measured', 'slopes'):
    ours, theirs = getattr(got, part), getattr(want, part)
    assert ours.keys() == theirs.keys()
    for key in theirs:
      assert np.shape(ours[key]) == np.shape(theirs[key]), key
      found[key] = distance(ours[key], theirs[key])
  return {key: value for key, value in found.items() if not value < tolerance}  # NaN is not


@pytest.mark.parametrize('name', cases('float64'))
def test_model_is_the_oracle(name):
  assert differences(answer(name, FLOAT64), expected(name), TOLERANCE['float64']) == {}


@pytest.mark.parametrize('name', cases('float32'))
def test_model_is_the_oracle_in_float32(name):
  assert differences(answer(name, FLOAT32), expected(name), TOLERANCE['float32']) == {}


def test_every_array_matters_to_the_loss():
  # Gradients that are zero on both sides agree about nothing.
  for name in ['bam_kv_experts', 'routed_attention_top_2', 'untied']:
    for path, slopes in expected(name).slopes.items():
      assert np.abs(slopes).max() > 1e-4, (name, path)


def test_the_tolerance_tells_epsilons_apart():
  name = 'dense_mha'
  params, batch = question(name)
  near = replace(CASES[name].model, norm_epsilon=1e-2 * (1 + 1e-6))
  params = oracle.map_leaves(lambda x: x.astype(np.float64), params)
  value = oracle.loss(params, near, LOSS, batch)
  assert distance(value, expected(name).loss) > 10 * TOLERANCE['float64']


SLOW = pytest.mark.slow


@pytest.mark.parametrize('name, how', [
  pytest.param('untied', dict(loss_chunk=4), marks=SLOW),
  pytest.param('bam_shared_kv', dict(remat='full'), marks=SLOW),
  ('dropping_top_2_of_3', dict(remat='full', loss_chunk=5, unroll=2)),
], ids=str)  # fmt: skip
def test_how_it_is_computed_changes_nothing(name, how):
  got = answer(name, replace(FLOAT64, **how))
  assert differences(got, expected(name), TOLERANCE['float64']) == {}


@pytest.mark.parametrize('platform, rows, name', [
  # The real size holds all of a tiny batch, so that no expert would need a second block.
  ('cpu', 4, 'btx_top_2'),
  pytest.param('cpu', 1, 'all_to_one_expert', marks=SLOW),
  ('tpu', 1, 'btx_top_3_of_6'),
  pytest.param('tpu', 1, 'all_to_one_expert', marks=SLOW),
  pytest.param('tpu', 1, 'two_norms', marks=SLOW),
])  # fmt: skip
def test_experts_of_any_platform_are_the_oracle(platform, rows, name, monkeypatch):
  real = grouped.ffn
  monkeypatch.setattr(grouped, 'BLOCK_ROWS', {'cpu': rows})
  monkeypatch.setattr(grouped, 'ffn', lambda *arguments: real(*arguments[:-1], platform))
  uncached = program.__wrapped__(CASES[name].model, FLOAT64)
  assert differences(uncached(*question(name)), expected(name), TOLERANCE['float64']) == {}


@pytest.mark.parametrize('name', ['bam_kv_experts', 'dropping_beside_padding'])
def test_what_padding_holds_changes_nothing(name):
  params, batch = question(name)
  padding = batch['segments'] == 0
  assert padding.any()
  other = {**batch, 'tokens': np.where(padding, (batch['tokens'] + 3) % 7, batch['tokens'])}
  other['positions'] = np.where(padding, 9, batch['positions']).astype(np.int32)
  got = program(CASES[name].model, FLOAT64)(params, other)
  assert differences(got, answer(name, FLOAT64), TOLERANCE['float64']) == {}


@pytest.mark.parametrize('name', ['bam_kv_experts', pytest.param('dense_qk_norm', marks=SLOW)])
def test_bfloat16_is_near_float32(name):
  params, batch = question(name)
  network = transformer.Network(CASES[name].model, config.Compute(dtype='bfloat16'))

  @jax.jit
  def run(params, batch):
    hidden_BTD, _ = network.hidden(params, batch['tokens'], batch['segments'], batch['positions'])
    return network.logits(params, hidden_BTD), loss.objective(network, LOSS, params, batch)[0]

  logits_BTV, value = jax.device_get(run(params, batch))
  assert logits_BTV.dtype == value.dtype == np.float32
  exact = answer(name, FLOAT32)
  # bfloat16 keeps 8 bits: 2^-8 a rounding, some ten roundings deep. Nothing at all would mean
  # that the type is ignored.
  assert 1e-4 < distance(logits_BTV[batch['segments'] > 0], exact.logits) < 0.05
  assert 1e-6 < distance(value, exact.loss) < 0.02


def test_initial_parameters_have_the_layout_of_the_oracle():
  for name, case in CASES.items():
    network = transformer.Network(case.model, config.Compute())
    got = oracle.leaves(jax.eval_shape(network.init, jax.random.key(0)))
    want = oracle.leaves(question(name)[0])
    assert {k: (x.shape, x.dtype) for k, x in got.items()} == {
      k: (x.shape, np.float32) for k, x in want.items()
    }
