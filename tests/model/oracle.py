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


def rms_norm(x_TD: np.ndarray, scale_D: np.ndarray, epsilon: float) -> np.ndarray:
  """Over the root of the mean square of the last axis."""
  return x_TD / np.sqrt((x_TD * x_TD).mean(-1, keepdims=True) + epsilon) * scale_D


def factor(model: config.Model, scale: np.ndarray) -> np.ndarray:
  """What a scale multiplies by: Gemma's are 1 + w."""
  return 1 + scale if model.norm == 'rmsnorm_plus_one' else scale


def norm(model: config.Model, x_TD: np.ndarray, w: dict) -> np.ndarray:
  """LayerNorm or RMSNorm, perhaps with a bias."""
  function = layer_norm if model.norm.startswith('layernorm') else rms_norm
  return function(x_TD, factor(model, w['scale']), model.norm_epsilon) + w.get('bias', 0)


def capped(x: np.ndarray, cap: float) -> np.ndarray:
  """Gemma's soft cap."""
  return cap * np.tanh(x / cap) if cap else x


def erf(x: np.ndarray) -> np.ndarray:
  """Of a real number, or to first order of one that a complex step has moved."""
  real = np.vectorize(math.erf, otypes=[float])(x.real)
  return (
    real + 1j * x.imag * 2 / math.sqrt(math.pi) * np.exp(-(x.real**2)) if x.imag.any() else real
  )


def frequency(
  i: int, channels: int, theta: float, scaling: config.RopeScaling | None
) -> tuple[float, float]:
  """Radians a position of pair i, and the factor of sine and cosine."""
  if theta == 0:
    return 0.0, 1.0
  f = theta ** (-2 * i / channels)
  if scaling is None:
    return f, 1.0
  if scaling.kind == 'linear':
    return f / scaling.factor, 1.0
  length = scaling.original_length
  if scaling.kind == 'llama3':
    wavelength = 2 * math.pi / f
    if wavelength < length / scaling.high:
      return f, 1.0
    if wavelength > length / scaling.low:
      return f / scaling.factor, 1.0
    smooth = (length / wavelength - scaling.low) / (scaling.high - scaling.low)
    return (1 - smooth) * f / scaling.factor + smooth * f, 1.0
  pair_of = lambda turns: (
    channels * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
  )
  low = max(math.floor(pair_of(scaling.beta_fast)), 0)
  high = min(math.ceil(pair_of(scaling.beta_slow)), channels - 1)
  ramp = min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0)
  factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
  return f / scaling.factor * ramp + f * (1 - ramp), factor


def rope(
  x_TK: np.ndarray,
  positions_T: np.ndarray,
  theta: float,
  channels: int = 0,
  layout: str = 'interleaved',
  scaling: config.RopeScaling | None = None,
) -> np.ndarray:
  """Turns the pair i of the first channels by position * frequency; the others pass."""
  channels = channels or x_TK.shape[1]
  out_TK = x_TK.copy()
  for i in range(channels // 2):
    f, factor = frequency(i, channels, theta, scaling)
    angle_T = positions_T * f
    one, two = (2 * i, 2 * i + 1) if layout == 'interleaved' else (i, i + channels // 2)
    one_T, two_T = x_TK[:, one], x_TK[:, two]
    out_TK[:, one] = factor * (one_T * np.cos(angle_T) - two_T * np.sin(angle_T))
    out_TK[:, two] = factor * (one_T * np.sin(angle_T) + two_T * np.cos(angle_T))
  return out_TK


def visible(segments_T: np.ndarray, window: int = 0) -> np.ndarray:
  """Whether position t sees position s: not later, in the same document, in the window."""
  T = len(segments_T)
  return np.array(
    [
      [
        s <= t and segments_T[s] == segments_T[t] and (not window or s > t - window)
        for s in range(T)
      ]
      for t in range(T)
    ]
  )


def mha(
  w: dict,
  y_TD: np.ndarray,
  segments_T: np.ndarray,
  positions_T: np.ndarray,
  model: config.Model,
  layer: int = 0,
  expert: int = 0,
) -> np.ndarray:
  """Multi-head attention of one expert over one sequence; GQA where there are fewer KV heads."""
  _, H, K = w['query'].shape
  G = w['key'].shape[1]
  sliding = bool(model.layer_types) and model.layer_types[layer] == 'sliding'
  theta, scaling = model.rope_theta, model.rope_scaling
  if model.attention_experts and model.attention_experts.ropes:
    own = model.attention_experts.ropes[expert]
    theta, scaling = own.theta, own.scaling
  if sliding and model.window_rope_theta:
    theta, scaling = model.window_rope_theta, None
  if layer in model.nope_layers:
    theta, scaling = 0.0, None
  visible_TT = visible(segments_T, model.window if sliding else 0)
  scale = model.attention_scale or 1 / math.sqrt(K)

  def project(name, count):
    x_hTK = np.stack([y_TD @ w[name][:, h] for h in range(count)])
    return x_hTK + w[f'{name}_bias'][:, None] if f'{name}_bias' in w else x_hTK

  def normed(x_hTK, name):
    if model.qk_norm == 'none':
      return x_hTK
    name = f'{name}_shared_scale' if model.qk_norm == 'head_rms' else f'{name}_scale'
    epsilon, scale = model.norm_epsilon, factor(model, w[name])
    if model.qk_norm == 'head_layernorm':
      return np.stack([layer_norm(x, s, epsilon) for x, s in zip(x_hTK, scale)])
    if model.qk_norm == 'head_rms':
      return np.stack([rms_norm(x, scale, epsilon) for x in x_hTK])
    side_by_side = np.concatenate(list(x_hTK), axis=1)
    whole = rms_norm(side_by_side, scale.ravel(), epsilon)
    return np.stack(np.split(whole, len(x_hTK), axis=1))

  turned = lambda x_TK: rope(
    x_TK, positions_T, theta, model.rotary_dim, model.rotary_layout, scaling
  )
  query_HTK, key_GTK = normed(project('query', H), 'query'), normed(project('key', G), 'key')
  value_GTK = project('value', G)
  out_TD = np.zeros_like(y_TD)
  for h in range(H):
    g = h // (H // G)
    scores_TT = scale * turned(query_HTK[h]) @ turned(key_GTK[g]).T
    scores_TT = capped(scores_TT, model.attention_cap)
    weights_TT = softmax(np.where(visible_TT, scores_TT, -np.inf))
    out_TD = out_TD + weights_TT @ value_GTK[g] @ w['out'][h]
  return out_TD + w['out_bias'] if 'out_bias' in w else out_TD


def feed(w: dict, y_D: np.ndarray, kind: str = 'swiglu') -> np.ndarray:
  """The FFN of one expert on one token."""
  up_F = y_D @ w['up'] + w.get('up_bias', 0)
  if kind == 'gelu':
    hidden_F = up_F * (1 + erf(up_F / math.sqrt(2))) / 2
  else:
    gate_F = y_D @ w['gate'] + w.get('gate_bias', 0)
    if kind == 'swiglu':
      gated_F = gate_F / (1 + np.exp(-gate_F))
    else:
      inner_F = math.sqrt(2 / math.pi) * (gate_F + 0.044715 * gate_F**3)
      gated_F = gate_F * (1 + np.tanh(inner_F)) / 2
    hidden_F = gated_F * up_F
  return hidden_F @ w['down'] + w.get('down_bias', 0)


def read_by_router(model: config.Model, y_BTD: np.ndarray, segments_BT: np.ndarray) -> np.ndarray:
  """Each token (N, D), or the mean of its document up to and including it."""
  if model.router_input == 'token':
    return y_BTD.reshape(-1, y_BTD.shape[-1])
  keep, read = 1 - 1 / model.router_memory if model.router_memory else 1.0, []
  for y_TD, segments_T in zip(y_BTD, segments_BT):
    for seen_T in visible(segments_T):
      weights = keep ** np.arange(seen_T.sum())[::-1]
      read.append(weights @ y_TD[seen_T] / weights.sum())
  return np.stack(read)


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
  w: dict,
  model: config.Model,
  y_BTD: np.ndarray,
  segments_BT: np.ndarray,
  positions_BT: np.ndarray,
  layer: int = 0,
) -> tuple[np.ndarray, list[Route]]:
  """One attention, or the mixture of attention: sum_j g_j MHA_j(y)."""
  experts = model.attention_experts
  B, T, _ = y_BTD.shape

  def one(w, expert=0):
    rows = zip(y_BTD, segments_BT, positions_BT)
    return np.stack([mha(w, *row, model, layer, expert) for row in rows])

  if experts is None:
    return one(w), []
  read_ND = read_by_router(model, y_BTD, segments_BT)
  route = choose('attention', w['router'], read_ND, experts.top_k, segments_BT.ravel() > 0)
  gates_BTE = gates_of(route, experts.renormalize).reshape(B, T, -1)
  out_BTD = np.zeros_like(y_BTD)
  for e in range(experts.num_experts):
    own = ('query', 'out') if experts.shared_kv else ('query', 'out', 'key', 'value')
    expert = {name: x[e] if name.split('_')[0] in own else x for name, x in w.items()}
    out_BTD = out_BTD + gates_BTE[:, :, e, None] * one(expert, e)
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
      out_ND[n] = feed(w, y_D, model.ffn)
    return out_ND.reshape(y_BTD.shape), []
  read_ND = read_by_router(model, y_BTD, segments_BT)
  real_N = segments_BT.ravel() > 0
  route = choose('ffn', w['router'], read_ND, experts.top_k, real_N, experts.capacity_factor)
  gates_NE = gates_of(route, experts.renormalize)
  for n, y_D in enumerate(y_ND):
    for e in route.choices_NC[n][route.kept_NC[n]]:
      expert = {name: x[e] for name, x in w.items() if name != 'router'}
      out_ND[n] += gates_NE[n, e] * feed(expert, y_D, model.ffn)
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
  routes, D, r = [], model.d_model, model.embedding_rank
  x_BTD = params['embed']['table'][tokens_BT, :D]
  # The sum of a real embedding and a complex block is complex: let the type be one throughout.
  x_BTD = x_BTD.astype(np.result_type(*leaves(params).values()))
  x_BTD = model.embedding_scale * x_BTD
  own_BTE = np.zeros((*tokens_BT.shape, 0))  # gates of the experts' own embeddings
  if r:
    first = at(params['blocks'], 0)
    y_BTD = norm(model, x_BTD, first['norm']) if 'norm' in first else x_BTD
    read_ND, options = read_by_router(model, y_BTD, segments_BT), model.ffn_experts
    router_DE, real_N = params['embed']['router'], segments_BT.ravel() > 0
    route = choose('embeddings', router_DE, read_ND, options.top_k, real_N)
    own_BTE = gates_of(route, options.renormalize).reshape(*tokens_BT.shape, -1)
  for e in range(own_BTE.shape[-1]):
    rows_Vr = params['embed']['table'][:, D + e * r : D + (e + 1) * r]
    own_VD = rows_Vr @ params['embed']['directions'][e * r : (e + 1) * r]
    x_BTD = x_BTD + model.embedding_scale * own_BTE[..., e, None] * own_VD[tokens_BT]
  where = segments_BT, positions_BT
  for layer in range(model.num_layers):
    w = at(params['blocks'], layer)
    normed = lambda x_BTD, name, w=w: norm(model, x_BTD, w[name]) if name in w else x_BTD
    y_BTD = normed(x_BTD, 'norm')
    added_BTD, route = attention(w['attention'], model, y_BTD, *where, layer)
    if model.block == 'parallel_two_norms':
      y_BTD = normed(x_BTD, 'ffn_norm')
    routes += route
    added_BTD = model.residual_scale * normed(added_BTD, 'attention_out_norm')
    if model.block == 'sequential':
      x_BTD = x_BTD + added_BTD
      y_BTD, added_BTD = normed(x_BTD, 'ffn_norm'), 0
    fed_BTD, route = ffn(w['ffn'], model, y_BTD, segments_BT)
    routes += route
    x_BTD = x_BTD + added_BTD + model.residual_scale * normed(fed_BTD, 'ffn_out_norm')
  x_BTD = norm(model, x_BTD, params['final_norm'])
  if model.tied_embeddings:
    kernel_XV, end = params['embed']['table'].T, params['embed']
  else:
    kernel_XV, end = params['unembed']['kernel'], params['unembed']
  logits_BTV = x_BTD @ kernel_XV[:D]
  for e in range(own_BTE.shape[-1]):
    own = slice(e * r, (e + 1) * r)
    own_DV = end['directions'][own].T @ kernel_XV[D:][own]
    logits_BTV = logits_BTV + own_BTE[..., e, None] * (x_BTD @ own_DV)
  return capped(model.logit_scale * logits_BTV, model.logit_cap), routes


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
  """What training minimises: weighted NLL over targets that count, plus the routers' losses."""
  logits_BTV, routes = forward(
    params, model, batch['tokens'], batch['segments'], batch['positions']
  )
  nll_BT = logsumexp(logits_BTV)
  for b, t in np.ndindex(nll_BT.shape):
    nll_BT[b, t] -= logits_BTV[b, t, batch['targets'][b, t]]
  total = (batch['weights'] * nll_BT).sum() / np.count_nonzero(batch['weights'])
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
  one = 0 if model.norm == 'rmsnorm_plus_one' else 1

  def norm_of(*shape):
    biased = {'bias': normal(1, *shape)} if model.norm == 'layernorm_bias' else {}
    return {'scale': one + 0.3 * normal(1, *shape)} | biased

  norms = ('norm',) if model.block == 'parallel' else ('norm', 'ffn_norm')
  if model.norm_place != 'pre':
    norms = *(norms if model.norm_place == 'both' else ()), 'attention_out_norm', 'ffn_out_norm'
  params = {
    'embed': {'table': normal(1, V, D)},
    'blocks': {
      **{name: norm_of(L, D) for name in norms},
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
    'final_norm': norm_of(D),
  }
  if attention:
    params['blocks']['attention']['router'] = normal(D, L, D, *E_attention)
  if ffn:
    params['blocks']['ffn']['router'] = normal(D, L, D, *E_ffn)
  if not model.tied_embeddings:
    params['unembed'] = {'kernel': normal(D, D, V)}
  if r := model.embedding_rank:
    rows = r * ffn.num_experts
    params['embed'] |= {'table': normal(1, V, D + rows), 'directions': normal(r, rows, D)}
    params['embed']['router'] = normal(D, D, *E_ffn)
    if not model.tied_embeddings:
      params['unembed'] = {'kernel': normal(D, D + rows, V), 'directions': normal(r, rows, D)}
  made = params['blocks']['attention']
  if model.qk_norm == 'head_rms':
    made['query_shared_scale'] = one + 0.3 * normal(1, L, *E_attention, K)
    made['key_shared_scale'] = one + 0.3 * normal(1, L, *E_kv, K)
  elif model.qk_norm != 'none':
    made['query_scale'] = 1 + 0.3 * normal(1, L, *E_attention, H, K)
    made['key_scale'] = 1 + 0.3 * normal(1, L, *E_kv, G, K)
  if model.biases != 'none':
    made['query_bias'] = normal(1, L, *E_attention, H, K)
    made['key_bias'], made['value_bias'] = normal(1, L, *E_kv, G, K), normal(1, L, *E_kv, G, K)
  if model.biases in ('attention', 'all'):
    made['out_bias'] = normal(1, L, *E_attention, D)
  fed = params['blocks']['ffn']
  if model.ffn == 'gelu':
    del fed['gate']
  if model.biases == 'all':
    fed |= {f'{name}_bias': normal(1, L, *E_ffn, F) for name in ('gate', 'up') if name in fed}
    fed['down_bias'] = normal(1, L, *E_ffn, D)
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
