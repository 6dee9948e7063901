"""Maps the tensors of a folder for transformers to our arrays: the same values, other names.

A dense model has Cohere's names. So does a mixture, with its experts in numbered modules, like
transformers' own mixtures. No files are read here: one tensor goes in, one comes out.

Legend: L layers, E experts, D model, H query heads, G key-value heads, K head, F FFN, V vocabulary.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bam_jax import config

HEAD = 'lm_head.weight'
TABLE = 'model.embed_tokens.weight'
STRIP = 32  # rows transposed at once: two cache lines of the output


class Tensor(NamedTuple):
  """One of our arrays, and its tensors in transformers: one for each layer and expert."""

  name: str  # '{0}' in it stands for the number of the layer, '{1}' for that of the expert
  stacked: tuple[int, ...]  # our axes of layers and experts
  ours: tuple[int, ...]  # the other axes
  theirs: tuple[int, ...]  # matrices are (out, in) in transformers

  @property
  def shape(self) -> tuple[int, ...]:
    """Of our array."""
    return *self.stacked, *self.ours

  @property
  def is_matrix(self) -> bool:
    """Whether the array is transposed in transformers."""
    return self.name.endswith(('_proj.weight', 'router.weight', HEAD))

  def parts(self) -> Iterator[tuple[tuple[int, ...], str]]:
    """The index of each part in our array, and its name in transformers."""
    for index in itertools.product(*map(range, self.stacked)):
      yield index, self.name.format(*index)


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
    made[f'blocks/{path}'] = Tensor(f'{prefix}{name}', stacked, ours, theirs)

  kv = None if attention and attention.shared_kv else attention
  made['embed/table'] = Tensor(TABLE, (), (V, D), (V, D))
  made['blocks/norm/scale'] = Tensor(layer + 'input_layernorm.weight', (L,), (D,), (D,))
  add('attention/query', attention, 'self_attn', 'q_proj.weight', (D, H, K), (H * K, D))
  add('attention/key', kv, 'self_attn', 'k_proj.weight', (D, G, K), (G * K, D))
  add('attention/value', kv, 'self_attn', 'v_proj.weight', (D, G, K), (G * K, D))
  add('attention/out', attention, 'self_attn', 'o_proj.weight', (H, K, D), (D, H * K))
  if model.qk_norm:
    add('attention/query_scale', attention, 'self_attn', 'q_norm.weight', (H, K), (H, K))
    add('attention/key_scale', kv, 'self_attn', 'k_norm.weight', (G, K), (G, K))
  if attention:
    E = attention.num_experts
    add('attention/router', None, 'self_attn', 'router.weight', (D, E), (E, D))
  add('ffn/gate', ffn, 'mlp', 'gate_proj.weight', (D, F), (F, D))
  add('ffn/up', ffn, 'mlp', 'up_proj.weight', (D, F), (F, D))
  add('ffn/down', ffn, 'mlp', 'down_proj.weight', (F, D), (D, F))
  if ffn:
    E = ffn.num_experts
    add('ffn/router', None, 'mlp', 'router.weight', (D, E), (E, D))
    if ffn.expert_bias:
      add('ffn/expert_bias', None, 'mlp', 'router.e_score_correction_bias', (E,), (E,))
  made['final_norm/scale'] = Tensor('model.norm.weight', (), (D,), (D,))
  if not model.tied_embeddings:
    made['unembed/kernel'] = Tensor(HEAD, (), (D, V), (V, D))
  return made


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
