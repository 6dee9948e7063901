"""The model and its loss in plain NumPy: slow, float64, written from the paper's equations alone.

Nothing here comes from bam_jax but the typed configuration, so that agreement with the JAX model
means something. Every function also runs on complex parameters and is analytic in them (no `abs`,
no `conj`; comparisons, maxima and choices look at real parts), so `gradient` can differentiate by
a complex step: f'(x) = Im f(x + ih) / h has no subtraction, hence no cancellation, and with
h = 1e-30 it is exact to rounding.

Shapes: B batch, T positions, N tokens (B * T, flattened), L layers, E experts, D model, H query
heads, G KV heads, K head, F FFN hidden, V vocabulary, C choices of a token (top-k).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bam_jax import config


@dataclass(frozen=True)
class Route:
  """What one router of one layer decided."""

  kind: str  # 'attention' or 'ffn'
  top_k: int  # 0 is soft routing
  logits_NE: np.ndarray
  probabilities_NE: np.ndarray  # softmax over all the experts
  choices_NC: np.ndarray  # experts a token visits, best first; all of them if soft
  kept_NC: np.ndarray  # False where the expert's buffer was full

  @property
  def dropped(self) -> int:
    """(token, choice) pairs that found their expert's buffer full."""
    return int((~self.kept_NC).sum())


def softmax(x: np.ndarray) -> np.ndarray:
  """Over the last axis."""
  e = np.exp(x - x.real.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def logsumexp(x: np.ndarray) -> np.ndarray:
  """Over the last axis."""
  m = x.real.max(-1, keepdims=True)
  return np.log(np.exp(x - m).sum(-1)) + m[..., 0]


def layer_norm(x_TD: np.ndarray, scale_D: np.ndarray, epsilon: float) -> np.ndarray:
  """LayerNorm with a scale and no bias."""
  centred_TD = x_TD - x_TD.mean(-1, keepdims=True)
  # Not np.var, which takes squared absolute values of complex numbers.
  variance_T1 = (centred_TD * centred_TD).mean(-1, keepdims=True)
  return centred_TD / np.sqrt(variance_T1 + epsilon) * scale_D


def rope(x_TK: np.ndarray, positions_T: np.ndarray, theta: float) -> np.ndarray:
  """Turns the pair (2i, 2i+1) by position * theta^(-2i/K)."""
  K = x_TK.shape[1]
  out_TK = np.zeros_like(x_TK)
  for i in range(K // 2):
    angle_T = positions_T * theta ** (-2 * i / K)
    even_T, odd_T = x_TK[:, 2 * i], x_TK[:, 2 * i + 1]
    out_TK[:, 2 * i] = even_T * np.cos(angle_T) - odd_T * np.sin(angle_T)
    out_TK[:, 2 * i + 1] = even_T * np.sin(angle_T) + odd_T * np.cos(angle_T)
  return out_TK


def visible(segments_T: np.ndarray) -> np.ndarray:
  """Whether position t sees position s: not later, and in the same document."""
  T = len(segments_T)
  return np.array([[s <= t and segments_T[s] == segments_T[t] for s in range(T)] for t in range(T)])


def mha(
  w: dict,
  y_TD: np.ndarray,
  segments_T: np.ndarray,
  positions_T: np.ndarray,
  theta: float,
  epsilon: float = 0.0,
) -> np.ndarray:
  """Multi-head attention of one expert over one sequence; GQA where there are fewer KV heads.

  Where `w` has scales for them, each head's queries and keys are normalised, with `epsilon`.
  """
  _, H, K = w['query'].shape
  G = w['key'].shape[1]
  visible_TT = visible(segments_T)
  out_TD = np.zeros_like(y_TD)
  for h in range(H):
    g = h // (H // G)
    query_TK, key_TK = y_TD @ w['query'][:, h], y_TD @ w['key'][:, g]
    if 'query_scale' in w:
      query_TK = layer_norm(query_TK, w['query_scale'][h], epsilon)
      key_TK = layer_norm(key_TK, w['key_scale'][g], epsilon)
    query_TK, key_TK = rope(query_TK, positions_T, theta), rope(key_TK, positions_T, theta)
    value_TK = y_TD @ w['value'][:, g]
    scores_TT = np.where(visible_TT, query_TK @ key_TK.T / math.sqrt(K), -np.inf)
    out_TD = out_TD + softmax(scores_TT) @ value_TK @ w['out'][h]
  return out_TD


def swiglu(w: dict, y_D: np.ndarray) -> np.ndarray:
  """The FFN of one expert on one token."""
  gate_F = y_D @ w['gate']
  silu_F = gate_F / (1 + np.exp(-gate_F))
  return (silu_F * (y_D @ w['up'])) @ w['down']


def choose(
  kind: str,
  router_DE: np.ndarray,
  y_ND: np.ndarray,
  top_k: int,
  real_N: np.ndarray,
  capacity_factor: float = 0.0,
) -> Route:
  """Softmax over all experts, the top-k of each token, and who fits in the experts' buffers.

  A buffer's size counts padding (it must not depend on the batch), but padding takes no room.
  """
  logits_NE = y_ND @ router_DE
  probabilities_NE = softmax(logits_NE)
  N, E = logits_NE.shape
  C = top_k or E
  # A stable sort of the negated gates puts the lowest index first among equals.
  choices_NC = np.argsort(-probabilities_NE.real, axis=-1, kind='stable')[:, :C]
  kept_NC = np.ones((N, C), bool)
  if capacity_factor:
    room_E = [math.ceil(capacity_factor * N * C / E)] * E
    for n in np.flatnonzero(real_N):
      for c in range(C):
        kept_NC[n, c] = room_E[choices_NC[n, c]] > 0
        room_E[choices_NC[n, c]] -= 1
  return Route(kind, top_k, logits_NE, probabilities_NE, choices_NC, kept_NC)


def gates_of(route: Route, renormalize: bool) -> np.ndarray:
  """The weight of every expert in every token's sum; 0 for those it does not visit."""
  gates_NE = np.zeros_like(route.probabilities_NE)
  for n, choices_C in enumerate(route.choices_NC):
    p_C = route.probabilities_NE[n, choices_C]
    gates_NE[n, choices_C] = (p_C / p_C.sum() if renormalize else p_C) * route.kept_NC[n]
  return gates_NE


def attention(
  w: dict, model: config.Model, y_BTD: np.ndarray, segments_BT: np.ndarray, positions_BT: np.ndarray
) -> tuple[np.ndarray, list[Route]]:
  """One attention, or the mixture of attention: sum_j g_j MHA_j(y)."""
  experts = model.attention_experts
  B, T, D = y_BTD.shape

  def one(w):
    rows = zip(y_BTD, segments_BT, positions_BT)
    return np.stack([mha(w, *row, model.rope_theta, model.norm_epsilon) for row in rows])

  if experts is None:
    return one(w), []
  route = choose(
    'attention', w['router'], y_BTD.reshape(-1, D), experts.top_k, segments_BT.ravel() > 0
  )
  gates_BTE = gates_of(route, experts.renormalize).reshape(B, T, -1)
  out_BTD = np.zeros_like(y_BTD)
  for e in range(experts.num_experts):
    own = ('query', 'query_scale', 'out')
    if not experts.shared_kv:
      own += ('key', 'key_scale', 'value')
    expert = {name: x[e] if name in own else x for name, x in w.items()}
    out_BTD = out_BTD + gates_BTE[:, :, e, None] * one(expert)
  return out_BTD, [route]


def ffn(
  w: dict, model: config.Model, y_BTD: np.ndarray, segments_BT: np.ndarray
) -> tuple[np.ndarray, list[Route]]:
  """One FFN, or the sum over each token's top-k of p_i FFN_i(y)."""
  experts = model.ffn_experts
  y_ND = y_BTD.reshape(-1, y_BTD.shape[-1])
  out_ND = np.zeros_like(y_ND)
  if experts is None:
    for n, y_D in enumerate(y_ND):
      out_ND[n] = swiglu(w, y_D)
    return out_ND.reshape(y_BTD.shape), []
  route = choose(
    'ffn', w['router'], y_ND, experts.top_k, segments_BT.ravel() > 0, experts.capacity_factor
  )
  gates_NE = gates_of(route, experts.renormalize)
  for n, y_D in enumerate(y_ND):
    for e in route.choices_NC[n][route.kept_NC[n]]:
      expert = {name: w[name][e] for name in ('gate', 'up', 'down')}
      out_ND[n] += gates_NE[n, e] * swiglu(expert, y_D)
  return out_ND.reshape(y_BTD.shape), [route]


def forward(
  params: dict,
  model: config.Model,
  tokens_BT: np.ndarray,
  segments_BT: np.ndarray,
  positions_BT: np.ndarray,
) -> tuple[np.ndarray, list[Route]]:
  """Logits of every position, and what every router decided.

  Args:
    params: the nested dict of arrays, float64 or complex128.
    model: its configuration.
    tokens_BT: token ids.
    segments_BT: the document of each position in its row; 0 is padding.
    positions_BT: positions in their documents, for RoPE.

  Returns:
    logits_BTV, and the routes in order of layers, attention before FFN.
  """
  routes = []
  x_BTD = params['embed']['table'][tokens_BT]
  # The sum of a real embedding and a complex block is complex: let the type be one throughout.
  x_BTD = x_BTD.astype(np.result_type(*leaves(params).values()))
  for layer in range(model.num_layers):
    w = at(params['blocks'], layer)
    y_BTD = layer_norm(x_BTD, w['norm']['scale'], model.norm_epsilon)
    attended_BTD, attention_route = attention(
      w['attention'], model, y_BTD, segments_BT, positions_BT
    )
    fed_BTD, ffn_route = ffn(w['ffn'], model, y_BTD, segments_BT)
    x_BTD = x_BTD + attended_BTD + fed_BTD
    routes += attention_route + ffn_route
  x_BTD = layer_norm(x_BTD, params['final_norm']['scale'], model.norm_epsilon)
  if model.tied_embeddings:
    kernel_DV = params['embed']['table'].T
  else:
    kernel_DV = params['unembed']['kernel']
  return model.logit_scale * (x_BTD @ kernel_DV), routes


def load_balance(route: Route, real_N: np.ndarray) -> complex:
  """L_LB = N * sum_i f_i P_i over real tokens; f counts choices and has no gradient."""
  E = route.logits_NE.shape[1]
  chosen = route.choices_NC[real_N].ravel().tolist()
  share_E = np.array([chosen.count(e) / len(chosen) for e in range(E)])
  return E * (share_E * route.probabilities_NE[real_N].mean(0)).sum()


def router_z(route: Route, real_N: np.ndarray) -> complex:
  """L_z = mean over real tokens of logsumexp(router logits)^2."""
  return (logsumexp(route.logits_NE[real_N]) ** 2).mean()


def loss(params: dict, model: config.Model, loss_config: config.Loss, batch: dict) -> complex:
  """What training minimises: mean NLL of the weighted targets plus the routers' losses."""
  logits_BTV, routes = forward(
    params, model, batch['tokens'], batch['segments'], batch['positions']
  )
  nll_BT = logsumexp(logits_BTV)
  for b, t in np.ndindex(nll_BT.shape):
    nll_BT[b, t] -= logits_BTV[b, t, batch['targets'][b, t]]
  total = (batch['weights'] * nll_BT).sum() / batch['weights'].sum()
  real_N = batch['segments'].ravel() > 0
  for route in routes:
    if route.top_k:
      total = total + loss_config.load_balance * load_balance(route, real_N)
    total = total + loss_config.router_z * router_z(route, real_N)
  return total


def gradient(fn: Callable[[dict], complex], params: dict) -> dict:
  """d fn / d params by a complex step of every element in turn: one evaluation each.

  Args:
    fn: an analytic, real function of the parameters, of real parts alone where it decides.
    params: the nested dict of float64 arrays.

  Returns:
    A nested dict of float64 arrays.
  """
  h = 1e-30
  moved = map_leaves(lambda x: x.astype(np.complex128), params)
  out = map_leaves(lambda x: np.zeros(x.shape), params)
  slopes = leaves(out)
  for name, x in leaves(moved).items():
    for index in np.ndindex(x.shape):
      start = x[index]
      x[index] = start + 1j * h
      slopes[name][index] = fn(moved).imag / h
      x[index] = start
  return out


def random_params(model: config.Model, rng: np.random.Generator) -> dict:
  """Parameters of the right shapes whose every part matters: no zeros, no ones, no equals."""
  V, D, L, F = model.vocab_size, model.d_model, model.num_layers, model.ffn_dim
  H, G, K = model.num_heads, model.num_kv_heads, model.head_dim

  def normal(fan_in, *shape):
    return rng.normal(size=shape) / math.sqrt(fan_in)

  attention, ffn = model.attention_experts, model.ffn_experts
  E_attention = (attention.num_experts,) if attention else ()
  E_kv = () if attention and attention.shared_kv else E_attention
  E_ffn = (ffn.num_experts,) if ffn else ()
  params = {
    'embed': {'table': normal(1, V, D)},
    'blocks': {
      'norm': {'scale': 1 + 0.3 * normal(1, L, D)},
      'attention': {
        # Queries are large enough for attention that is far from uniform.
        'query': 2 * normal(D, L, *E_attention, D, H, K),
        'key': normal(D, L, *E_kv, D, G, K),
        'value': normal(D, L, *E_kv, D, G, K),
        'out': normal(H * K, L, *E_attention, H, K, D),
      },
      'ffn': {
        'gate': normal(D, L, *E_ffn, D, F),
        'up': normal(D, L, *E_ffn, D, F),
        'down': normal(F, L, *E_ffn, F, D),
      },
    },
    'final_norm': {'scale': 1 + 0.3 * normal(1, D)},
  }
  if attention:
    params['blocks']['attention']['router'] = normal(D, L, D, *E_attention)
  if ffn:
    params['blocks']['ffn']['router'] = normal(D, L, D, *E_ffn)
  if not model.tied_embeddings:
    params['unembed'] = {'kernel': normal(D, D, V)}
  if model.qk_norm:
    params['blocks']['attention'] |= {
      'query_scale': 1 + 0.3 * normal(1, L, *E_attention, H, K),
      'key_scale': 1 + 0.3 * normal(1, L, *E_kv, G, K),
    }
  return params


def map_leaves(fn: Callable, tree: dict) -> dict:
  """A nested dict with every array replaced by fn of it."""
  return {name: map_leaves(fn, x) if isinstance(x, dict) else fn(x) for name, x in tree.items()}


def leaves(tree: dict, prefix: str = '') -> dict[str, np.ndarray]:
  """The arrays of a nested dict by their paths, `blocks/ffn/up` and so on."""
  out = {}
  for name, x in tree.items():
    out |= leaves(x, f'{prefix}{name}/') if isinstance(x, dict) else {prefix + name: x}
  return out


def at(tree: dict, index: int) -> dict:
  """Every array of a nested dict at one index of axis 0."""
  return map_leaves(lambda x: x[index], tree)
