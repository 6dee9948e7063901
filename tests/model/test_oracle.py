"""The oracle against facts that need no model: hand-worked cases, identities, differences."""

import math

import numpy as np
import pytest

from bam_jax import config
from tests.model import oracle

TINY = dict(vocab_size=5, d_model=3, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2)
DENSE = config.Model(**TINY, ffn_dim=2)


def tiny(**changes) -> config.Model:
  return config.Model(**{**TINY, 'ffn_dim': 2, **changes})


def normalised(**changes) -> config.Model:
  return tiny(
    **{'rope_theta': 10.0, 'qk_norm': 'head_layernorm', 'norm_epsilon': 1e-300, **changes}
  )


def batch(rng: np.random.Generator, vocab_size: int = 5) -> dict:
  """Two rows: two documents, and one document before padding."""
  return {
    'tokens': rng.integers(0, vocab_size, (2, 4)),
    'targets': rng.integers(0, vocab_size, (2, 4)),
    'segments': np.array([[1, 1, 2, 2], [1, 1, 1, 0]]),
    'positions': np.array([[0, 1, 0, 1], [0, 1, 2, 0]]),
    'weights': np.array([[1, 0.5, 1, 0], [1, 2, 1, 0]]),
  }


def logits(params: dict, model: config.Model, inputs: dict) -> np.ndarray:
  return oracle.forward(params, model, inputs['tokens'], inputs['segments'], inputs['positions'])[0]


def with_router(params: dict, part: str, router_LDE: np.ndarray) -> dict:
  blocks = dict(params['blocks'])
  blocks[part] = {**blocks[part], 'router': router_LDE}
  return {**params, 'blocks': blocks}


# The functions.


def test_layer_norm_has_population_variance_and_epsilon_inside_the_root():
  x = np.array([[1.0, 3.0], [-2.0, -2.0]])
  out = oracle.layer_norm(x, np.array([1.0, 10.0]), epsilon=3.0)
  # Row 0: mean 2, variance 1, so (-1, 1) / sqrt(1 + 3).
  np.testing.assert_allclose(out, [[-0.5, 5.0], [0.0, 0.0]], rtol=1e-15)


def test_rope_turns_neighbouring_pairs():
  positions = np.array([0, 1, 7])
  first = oracle.rope(np.tile([1.0, 0, 0, 0], (3, 1)), positions, theta=100.0)
  second = oracle.rope(np.tile([0, 0, 1.0, 0], (3, 1)), positions, theta=100.0)
  zeros = 0 * positions
  np.testing.assert_allclose(
    first, np.stack([np.cos(positions), np.sin(positions), zeros, zeros], 1), atol=1e-15
  )
  angles = positions / 10  # theta^(-2/4)
  np.testing.assert_allclose(
    second, np.stack([zeros, zeros, np.cos(angles), np.sin(angles)], 1), atol=1e-15
  )


def test_a_position_sees_its_document_up_to_itself():
  x, o = True, False
  np.testing.assert_array_equal(
    oracle.visible(np.array([1, 1, 2, 2, 0])),
    [
      [x, o, o, o, o],
      [x, x, o, o, o],
      [o, o, x, o, o],
      [o, o, x, x, o],
      [o, o, o, o, x],
    ],
  )


def test_one_head_attention_worked_by_hand():
  eye = np.eye(2)
  w = {name: eye[:, None] for name in ('query', 'key', 'value')} | {'out': 2 * eye[None]}
  y = np.array([[1.0, 0.0], [0.0, 1.0]])
  out = oracle.mha(w, y, np.array([1, 1]), np.array([0, 0]), tiny(rope_theta=10.0))
  # Without rotation the scores of position 1 are (0, 1 / sqrt 2).
  p = math.exp(0.5**0.5) / (1 + math.exp(0.5**0.5))
  np.testing.assert_allclose(out, [[2, 0], [2 * (1 - p), 2 * p]], rtol=1e-14)


def test_normalised_heads_worked_by_hand():
  # Both rows are (-1, 1) after a norm, so that queries are (-2, 0) and keys (-3, 5).
  y_TD = np.array([[1.0, 3.0], [10.0, 30.0]])
  w = {name: np.eye(2)[:, None] for name in ('query', 'key', 'value')} | {
    'out': np.eye(2)[None],
    'query_scale': np.array([[2.0, 0.0]]),
    'key_scale': np.array([[3.0, 5.0]]),
  }
  segments, still = np.array([1, 1]), np.array([0, 0])
  # Without rotation all scores are equal: an even mean.
  out = oracle.mha(w, y_TD, segments, still, normalised())
  np.testing.assert_allclose(out, [[1, 3], [5.5, 16.5]], rtol=1e-14)
  # The second row turns by 1, after its norm.
  out = oracle.mha(w, y_TD, segments, np.array([0, 1]), normalised())
  query = -2 * np.array([math.cos(1), math.sin(1)])
  key = np.array([-3 * math.cos(1) - 5 * math.sin(1), -3 * math.sin(1) + 5 * math.cos(1)])
  p = 1 / (1 + math.exp((query @ [-3, 5] - query @ key) / 2**0.5))
  np.testing.assert_allclose(out[1], (1 - p) * y_TD[0] + p * y_TD[1], rtol=1e-13)
  # An epsilon of 3 halves the first row, of variance 1, and leaves 10 / sqrt 103 of the second.
  out = oracle.mha(w, y_TD, segments, still, normalised(norm_epsilon=3.0))
  first, second = 1 / 2, 10 / 103**0.5
  p = 1 / (1 + math.exp(6 * second * (first - second) / 2**0.5))
  np.testing.assert_allclose(out[1], (1 - p) * y_TD[0] + p * y_TD[1], rtol=1e-13)


def test_swiglu_worked_by_hand():
  w = {
    'gate': np.array([[0.0, 1.0]]),
    'up': np.array([[5.0, 3.0]]),
    'down': np.array([[1.0], [2.0]]),
  }
  # silu(0) = 0 hides the first; silu(2) = 2 sigmoid(2), times up 6, times down 2.
  expected = 2 / (1 + math.exp(-2)) * 6 * 2
  np.testing.assert_allclose(oracle.feed(w, np.array([2.0])), [expected], rtol=1e-14)


def test_gelus_worked_by_hand():
  w = {name: np.array([[float(i)]]) for i, name in enumerate(('gate', 'up', 'down'), 1)}
  w |= {'up_bias': np.array([-1.0]), 'gate_bias': np.array([0.5]), 'down_bias': np.array([0.1])}
  y = np.array([1.0])
  # The normal distribution's share below 1 is 0.841345; the tanh formula's at 1.5, 0.933064.
  np.testing.assert_allclose(oracle.feed(w, y, 'gelu'), [0.1 + 3 * 0.841345], atol=1e-5)
  np.testing.assert_allclose(oracle.feed(w, y, 'geglu_tanh'), [0.1 + 3 * 1.5 * 0.933064], atol=1e-3)


# Routers.


def choose(router_DE, y_ND, top_k, padding=(), capacity_factor=0.0) -> oracle.Route:
  real_N = np.array([n not in padding for n in range(len(y_ND))])
  return oracle.choose(
    'ffn', np.asarray(router_DE), np.asarray(y_ND), top_k, real_N, capacity_factor
  )


def test_equal_gates_go_to_the_lowest_index():
  route = choose(np.zeros((3, 4)), np.ones((2, 3)), top_k=2)
  np.testing.assert_array_equal(route.choices_NC, [[0, 1], [0, 1]])
  np.testing.assert_array_equal(route.probabilities_NE, np.full((2, 4), 0.25))


def test_the_largest_gates_are_chosen_and_optionally_sum_to_one():
  logits = np.log([[0.1, 0.5, 0.15, 0.25]])
  route = choose(logits, np.ones((1, 1)), top_k=2)
  np.testing.assert_array_equal(route.choices_NC, [[1, 3]])
  np.testing.assert_allclose(oracle.gates_of(route, False), [[0, 0.5, 0, 0.25]], rtol=1e-14)
  np.testing.assert_allclose(oracle.gates_of(route, True), [[0, 2 / 3, 0, 1 / 3]], rtol=1e-14)


def test_a_full_buffer_drops_the_later_tokens():
  # Tokens 0, 1, 2, 4 want expert 0; token 3 wants expert 1. Room: ceil(1 * 5 * 1 / 2) = 3 each.
  router_DE, y_ND = [[1.0, -1.0]], [[1.0], [1.0], [1.0], [-1.0], [1.0]]
  route = choose(router_DE, y_ND, top_k=1, capacity_factor=1.0)
  np.testing.assert_array_equal(route.kept_NC[:, 0], [True, True, True, True, False])
  assert route.dropped == 1
  assert not oracle.gates_of(route, True)[4].any()
  # ceil(1.3 * 2.5) = 4.
  assert choose(router_DE, y_ND, top_k=1, capacity_factor=1.3).dropped == 0
  assert choose(router_DE, y_ND, top_k=1, padding=[1], capacity_factor=1.0).dropped == 0


def test_a_token_takes_room_for_all_its_choices():
  # Everyone wants 0 and 1 of 3, with room for ceil(3 * 2 / 3) = 2 at each.
  route = choose([[2.0, 1.0, 0.0]], np.ones((3, 1)), top_k=2, capacity_factor=1.0)
  np.testing.assert_array_equal(route.kept_NC, [[True, True], [True, True], [False, False]])


def test_balance_loss_worked_by_hand():
  p_NE = np.array([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.1, 0.2, 0.7]])
  route = choose(np.log(p_NE), np.eye(3), top_k=2)
  # Of the first two tokens' four choices, two are 0, one 1, one 2.
  expected = 3 * (1 / 2 * 0.55 + 1 / 4 * 0.2 + 1 / 4 * 0.25)
  real_N = np.array([True, True, False])
  np.testing.assert_allclose(oracle.load_balance(route, real_N), expected, rtol=1e-14)


def test_z_loss_worked_by_hand():
  logits = np.array([[0.0, math.log(3)], [math.log(2), math.log(2)], [9.0, 9.0]])
  route = choose(logits, np.eye(3), top_k=1)
  real_N = np.array([True, True, False])
  np.testing.assert_allclose(oracle.router_z(route, real_N), math.log(4) ** 2, rtol=1e-14)


# The whole model.


def test_the_loss_is_a_mean_of_weighted_target_log_probabilities():
  rng = np.random.default_rng(8)
  inputs, params = batch(rng), oracle.random_params(DENSE, rng)
  p = oracle.softmax(logits(params, DENSE, inputs))
  terms = [
    inputs['weights'][b, t] * -math.log(p[b, t, inputs['targets'][b, t]])
    for b in range(2)
    for t in range(4)
  ]
  np.testing.assert_allclose(
    oracle.loss(params, DENSE, config.Loss(), inputs), sum(terms) / 6, rtol=1e-13
  )


def test_which_routers_pay_which_loss():
  rng = np.random.default_rng(9)
  inputs = batch(rng)

  def paid(attention_top_k):
    model = tiny(
      attention_experts=config.AttentionExperts(3, top_k=attention_top_k),
      ffn_experts=config.FFNExperts(2),
    )
    params = oracle.random_params(model, rng)
    params = with_router(params, 'attention', np.zeros((2, 3, 3)))
    params = with_router(params, 'ffn', np.zeros((2, 3, 2)))
    bare, balance, z = (
      oracle.loss(params, model, config.Loss(load_balance=a, router_z=b), inputs)
      for a, b in [(0, 0), (1, 0), (0, 1)]
    )
    return balance - bare, z - bare

  # Even routers: L_LB is 1 and L_z is log(experts)^2, in each of two layers.
  z = 2 * (math.log(3) ** 2 + math.log(2) ** 2)
  np.testing.assert_allclose(paid(attention_top_k=0), (2, z), rtol=1e-12)
  np.testing.assert_allclose(paid(attention_top_k=1), (4, z), rtol=1e-12)


# The complex step.


def test_gradient_of_a_known_function():
  params = {'a': {'x': np.array([2.0, 3.0])}, 'y': np.array([[5.0]])}
  slopes = oracle.gradient(
    lambda p: p['a']['x'][0] ** 3 * p['a']['x'][1] + np.exp(p['y'][0, 0]), params
  )
  np.testing.assert_allclose(slopes['a']['x'], [36, 8], rtol=1e-15)
  np.testing.assert_allclose(slopes['y'], [[math.exp(5)]], rtol=1e-15)
  assert params['a']['x'].tolist() == [2, 3]


@pytest.mark.parametrize('model', [
  tiny(
    attention_experts=config.AttentionExperts(2),
    ffn_experts=config.FFNExperts(3, top_k=2, capacity_factor=1.0),
  ),
  tiny(
    tied_embeddings=False,
    attention_experts=config.AttentionExperts(3, top_k=2, shared_kv=True, renormalize=True),
    ffn_experts=config.FFNExperts(2, renormalize=True),
  ),
], ids=['soft', 'routed'])  # fmt: skip
def test_complex_step_agrees_with_finite_differences(model):
  rng = np.random.default_rng(10)
  inputs, params = batch(rng), oracle.random_params(model, rng)
  losses = config.Loss(load_balance=0.5, router_z=0.5)
  slopes = oracle.leaves(oracle.gradient(lambda p: oracle.loss(p, model, losses, inputs), params))
  h = 1e-5
  for name, x in oracle.leaves(params).items():
    # Along a random direction: two evaluations check every element of an array.
    direction = rng.normal(size=x.shape)
    ends = []
    for sign in (1, -1):
      start = x.copy()
      x += sign * h * direction
      ends.append(oracle.loss(params, model, losses, inputs))
      x[...] = start
    measured = (ends[0] - ends[1]) / (2 * h)
    expected = (slopes[name] * direction).sum()
    assert expected == pytest.approx(measured, rel=1e-6, abs=1e-8), name
    # An array that the loss ignores would pass by being zero on both sides.
    assert np.abs(slopes[name]).max() > 1e-4, name
