"""Maps the tensors of a folder for transformers to our arrays: the same values, other names.

A dense model has Cohere's names. So does a mixture, with its experts in numbered modules, like
transformers' own mixtures. No files are read here: one tensor goes in, one comes out.

Legend: L layers, E experts, D model, H query heads, G key-value heads, K head, F FFN, V vocabulary.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from bam_jax import config

HEAD = 'lm_head.weight'
TABLE = 'model.embed_tokens.weight'
# The norms of a block; with others on outputs that of the FFN has a name of its own.
_NORMS = {
  'norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm',
  'attention_out_norm': 'post_attention_layernorm', 'ffn_out_norm': 'post_feedforward_layernorm',
}  # fmt: skip
STRIP = 32  # rows transposed at once: two cache lines of the output


class Tensor(NamedTuple):
  """One of our arrays, and its tensors in transformers: one for each layer and expert."""

  name: str  # '{0}' in it stands for the number of the layer, '{1}' for that of the expert
  stacked: tuple[int, ...]  # our axes of layers and experts
  ours: tuple[int, ...]  # the other axes
  theirs: tuple[int, ...]  # matrices are (out, in) in transformers
  is_matrix: bool = False  # whether the array is transposed there
  heads: int = 0  # of a tensor whose rows are queries, keys and values of one head after the other

  @property
  def shape(self) -> tuple[int, ...]:
    """Of our array."""
    return *self.stacked, *self.ours


Table = dict[str, Tensor]  # of a whole model, by our paths


def tensors(model: config.Model) -> Table:
  """All tensors of a model by our paths, in the order of computation."""
  D, F, V, L = model.d_model, model.ffn_dim, model.vocab_size, model.num_layers
  H, G, K = model.num_heads, model.num_kv_heads, model.head_dim
  attention, ffn = model.attention_experts, model.ffn_experts
  layer = 'model.layers.{0}.'
  made = {}

  def add(path, experts, module, name, ours, theirs) -> None:
    """Adds an array of every layer and, if it has experts of its own, of every expert."""
    prefix = f'{layer}{module}.experts.{{1}}.' if experts else f'{layer}{module}.'
    stacked = (L, experts.num_experts) if experts else (L,)
    is_matrix = name.endswith(('_proj.weight', 'router.weight'))
    made[f'blocks/{path}'] = Tensor(f'{prefix}{name}', stacked, ours, theirs, is_matrix)

  kv = None if attention and attention.shared_kv else attention
  made['embed/table'] = Tensor(TABLE, (), (V, D), (V, D))
  ends = {'scale': 'weight'} | ({'bias': 'bias'} if model.norm == 'layernorm_bias' else {})
  norms = _NORMS | ({'ffn_norm': 'pre_feedforward_layernorm'} if model.norm_place == 'both' else {})
  for ours, end in itertools.product(model.norms, ends):
    name = f'{layer}{norms[ours]}.{ends[end]}'
    made[f'blocks/{ours}/{end}'] = Tensor(name, (L,), (D,), (D,))
  for ours, letter, experts, heads in (
    ('query', 'q', attention, H), ('key', 'k', kv, G), ('value', 'v', kv, G)
  ):  # fmt: skip
    name, width = f'{letter}_proj', heads * K
    add(f'attention/{ours}', experts, 'self_attn', f'{name}.weight', (D, heads, K), (width, D))
    if model.biases != 'none':
      add(f'attention/{ours}_bias', experts, 'self_attn', f'{name}.bias', (heads, K), (width,))
    if ours != 'value' and model.qk_norm != 'none':
      scale = 'shared_scale' if model.qk_norm == 'head_rms' else 'scale'
      shape = (K,) if model.qk_norm == 'head_rms' else (heads, K)
      theirs = (width,) if model.qk_norm == 'all_rms' else shape
      name = f'{letter}_norm.weight'
      add(f'attention/{ours}_{scale}', experts, 'self_attn', name, shape, theirs)
  add('attention/out', attention, 'self_attn', 'o_proj.weight', (H, K, D), (D, H * K))
  if model.biases in ('attention', 'all'):
    add('attention/out_bias', attention, 'self_attn', 'o_proj.bias', (D,), (D,))
  if attention:
    E = attention.num_experts
    add('attention/router', None, 'self_attn', 'router.weight', (D, E), (E, D))
  for ours in (*model.ffn_inputs, 'down'):
    shape = (F, D) if ours == 'down' else (D, F)
    add(f'ffn/{ours}', ffn, 'mlp', f'{ours}_proj.weight', shape, shape[::-1])
    if model.biases == 'all':
      add(f'ffn/{ours}_bias', ffn, 'mlp', f'{ours}_proj.bias', shape[1:], shape[1:])
  if ffn:
    E = ffn.num_experts
    add('ffn/router', None, 'mlp', 'router.weight', (D, E), (E, D))
    if ffn.expert_bias:
      add('ffn/expert_bias', None, 'mlp', 'router.e_score_correction_bias', (E,), (E,))
  for end, theirs in ends.items():
    made[f'final_norm/{end}'] = Tensor(f'model.norm.{theirs}', (), (D,), (D,))
  if not model.tied_embeddings:
    made['unembed/kernel'] = Tensor(HEAD, (), (D, V), (V, D), True)
  return made


def renamed(table: Table, parts: Iterable[tuple[str, str]]) -> Table:
  """A table with other parts of names, replaced in this order."""
  for ours, theirs in parts:
    table = {k: one._replace(name=one.name.replace(ours, theirs)) for k, one in table.items()}
  return table


def regrouped(rows: np.ndarray, outer: int, inner: int) -> np.ndarray:
  """Rows in `outer` groups of `inner` groups, as `inner` groups of `outer`."""
  return rows.reshape(outer, inner, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


class Piece(NamedTuple):
  """A part of one of our arrays, and the rows of a tensor that it is."""

  path: str
  index: tuple[int, ...]  # layer and expert
  start: int
  stop: int


def pieces(table: Table) -> dict[str, list[Piece]]:
  """The pieces of every tensor, by its name, in the order of its rows."""
  found: dict[str, list] = {}
  for path, tensor in table.items():
    for index in itertools.product(*map(range, tensor.stacked)):
      found.setdefault(tensor.name.format(*index), []).append((index, path))
  for name, rows in found.items():
    rows.sort(key=lambda row: row[0])  # expert by expert
    stops = [0, *itertools.accumulate(table[path].theirs[0] for _, path in rows)]
    found[name] = [Piece(path, index, *stops[n : n + 2]) for n, (index, path) in enumerate(rows)]
  return found


def to_ours(tensor: Tensor, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """A tensor of transformers as a part of our array, contiguous."""
  return _cast(array, dtype, tensor.is_matrix).reshape(tensor.ours)


def to_theirs(tensor: Tensor, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """A part of our array as a tensor of transformers, contiguous; the inverse of `to_ours`."""
  shape = tensor.theirs[::-1] if tensor.is_matrix else tensor.theirs
  return _cast(array.reshape(shape), dtype, tensor.is_matrix)


def _cast(array: np.ndarray, dtype: np.dtype, transpose: bool) -> np.ndarray:
  """A copy; transposed in strips, which is several times as fast as `array.T.copy()`."""
  if not transpose:
    return array.astype(dtype)
  transposed = np.empty(array.shape[::-1], dtype)
  for row in range(0, len(array), STRIP):
    transposed[:, row : row + STRIP] = array[row : row + STRIP].astype(dtype).T
  return transposed
