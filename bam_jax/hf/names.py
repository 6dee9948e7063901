"""The tensors of a folder for transformers and our arrays: the same values under other names.

A dense model has Cohere's names. A mixture has them too, with its experts in numbered modules, as
transformers' own mixtures do. Nothing here reads files: one tensor goes in, one comes out.

Legend: L layers, E experts, D model, H query heads, G key-value heads, K head, F FFN, V vocabulary.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bam_jax import config

HEAD = 'lm_head.weight'
TABLE = 'model.embed_tokens.weight'
STRIP = 32  # rows that are transposed at once: two cache lines of what is written


class Tensor(NamedTuple):
  """One of our arrays, and the tensors that it is over there: one for each layer and expert."""

  name: str  # '{0}' in it stands for the number of the layer, '{1}' for that of the expert
  stacked: tuple[int, ...]  # our axes of layers and experts
  ours: tuple[int, ...]  # the other axes
  theirs: tuple[int, ...]  # matrices are (out, in) over there

  @property
  def is_matrix(self) -> bool:
    """Whether the array multiplies tokens, and is therefore transposed over there."""
    return self.name.endswith(('_proj.weight', 'router.weight', HEAD))

  def parts(self) -> Iterator[tuple[tuple[int, ...], str]]:
    """The index of each part in our array, and its name over there."""
    for index in itertools.product(*map(range, self.stacked)):
      yield index, self.name.format(*index)


def tensors(model: config.Model) -> dict[str, Tensor]:
  """All the tensors of a model by our paths, in the order in which our checkpoints have them."""
  D, F, V, L = model.d_model, model.ffn_dim, model.vocab_size, model.num_layers
  H, G, K = model.num_heads, model.num_kv_heads, model.head_dim
  attention, ffn = model.attention_experts, model.ffn_experts
  layer = 'model.layers.{0}.'
  shared = layer + 'self_attn.', (L,)
  own = shared
  if attention:
    own = layer + 'self_attn.experts.{1}.', (L, attention.num_experts)
  key_value = own if attention and not attention.shared_kv else shared
  mlp = layer + 'mlp.', (L,)
  if ffn:
    mlp = layer + 'mlp.experts.{1}.', (L, ffn.num_experts)

  def under(place: tuple[str, tuple[int, ...]], name: str, ours, theirs) -> Tensor:
    prefix, stacked = place
    return Tensor(f'{prefix}{name}.weight', stacked, ours, theirs)

  made = {
    'embed/table': Tensor(TABLE, (), (V, D), (V, D)),
    'blocks/norm/scale': Tensor(layer + 'input_layernorm.weight', (L,), (D,), (D,)),
    'blocks/attention/query': under(own, 'q_proj', (D, H, K), (H * K, D)),
    'blocks/attention/key': under(key_value, 'k_proj', (D, G, K), (G * K, D)),
    'blocks/attention/value': under(key_value, 'v_proj', (D, G, K), (G * K, D)),
    'blocks/attention/out': under(own, 'o_proj', (H, K, D), (D, H * K)),
    'blocks/ffn/gate': under(mlp, 'gate_proj', (D, F), (F, D)),
    'blocks/ffn/up': under(mlp, 'up_proj', (D, F), (F, D)),
    'blocks/ffn/down': under(mlp, 'down_proj', (F, D), (D, F)),
    'final_norm/scale': Tensor('model.norm.weight', (), (D,), (D,)),
  }
  if model.qk_norm:
    made['blocks/attention/query_scale'] = under(own, 'q_norm', (H, K), (H, K))
    made['blocks/attention/key_scale'] = under(key_value, 'k_norm', (G, K), (G, K))
  for part, name, experts in (('attention', 'self_attn', attention), ('ffn', 'mlp', ffn)):
    if experts:
      E, router = experts.num_experts, f'{layer}{name}.router.'
      made[f'blocks/{part}/router'] = Tensor(router + 'weight', (L,), (D, E), (E, D))
  if ffn and ffn.expert_bias:
    bias = layer + 'mlp.router.e_score_correction_bias'
    made['blocks/ffn/expert_bias'] = Tensor(bias, (L,), (ffn.num_experts,), (ffn.num_experts,))
  if not model.tied_embeddings:
    made['unembed/kernel'] = Tensor(HEAD, (), (D, V), (V, D))
  return made


def to_ours(tensor: Tensor, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """One tensor of theirs as a part of our array, contiguous."""
  array = _transpose(array, dtype) if tensor.is_matrix else array.astype(dtype)
  return array.reshape(tensor.ours)


def to_theirs(tensor: Tensor, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """One part of our array as a tensor of theirs, contiguous; undoes `to_ours`."""
  array = array.reshape(tensor.theirs[::-1] if tensor.is_matrix else tensor.theirs)
  return _transpose(array, dtype) if tensor.is_matrix else array.astype(dtype)


def _transpose(matrix: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """A transposed and cast copy; in strips, which is several times as fast as `matrix.T.copy()`."""
  transposed = np.empty(matrix.shape[::-1], dtype)
  for row in range(0, len(matrix), STRIP):
    transposed[:, row : row + STRIP] = matrix[row : row + STRIP].astype(dtype).T
  return transposed
