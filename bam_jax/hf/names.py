"""Maps the tensors of a folder for transformers to our arrays: the same values, other names.

A dense model has Cohere's names. So does a mixture, with its experts in numbered modules, like
transformers' own mixtures. No files are read here: one tensor goes in, one comes out.

Legend: L layers, E experts, D model, H query heads, G key-value heads, K head, F FFN, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from bam_jax import config
from bam_jax.model import transformer
from bam_jax.parallel import sharding

HEAD = 'lm_head.weight'
TABLE = 'model.embed_tokens.weight'
_MODULES = {
  'embed': 'model.embed_tokens', 'final_norm': 'model.norm', 'unembed': 'lm_head',
  'attention': 'self_attn', 'ffn': 'mlp',
  'norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm',
  'attention_out_norm': 'post_attention_layernorm', 'ffn_out_norm': 'post_feedforward_layernorm',
}  # fmt: skip
# In the order of the rows where several are one tensor.
_PARAMETERS = {
  'table': 'weight', 'kernel': 'weight', 'scale': 'weight', 'bias': 'bias',
  'query': 'q_proj.weight', 'key': 'k_proj.weight', 'value': 'v_proj.weight',
  'query_bias': 'q_proj.bias', 'key_bias': 'k_proj.bias', 'value_bias': 'v_proj.bias',
  'query_scale': 'q_norm.weight', 'key_scale': 'k_norm.weight',
  'query_shared_scale': 'q_norm.weight', 'key_shared_scale': 'k_norm.weight',
  'out': 'o_proj.weight', 'out_bias': 'o_proj.bias', 'router': 'router.weight',
  'gate': 'gate_proj.weight', 'up': 'up_proj.weight', 'down': 'down_proj.weight',
  'gate_bias': 'gate_proj.bias', 'up_bias': 'up_proj.bias', 'down_bias': 'down_proj.bias',
  'expert_bias': 'router.e_score_correction_bias',
}  # fmt: skip
STRIP = 32  # rows transposed at once: two cache lines of the output


class Tensor(NamedTuple):
  """One of our arrays, and its tensors in transformers: one for each layer and expert."""

  name: str  # '{0}' in it stands for the number of the layer, '{1}' for that of the expert
  stacked: tuple[int, ...]  # our axes of layers and experts
  ours: tuple[int, ...]  # the other axes
  theirs: tuple[int, ...]  # matrices are (out, in) in transformers
  is_matrix: bool = False  # whether the array is transposed there

  @property
  def shape(self) -> tuple[int, ...]:
    """Of our array."""
    return *self.stacked, *self.ours


Table = dict[str, Tensor]  # of a whole model, by our paths


def tensors(model: config.Model) -> Table:
  """All tensors of a model by our paths; of those that may be one tensor the first rows first."""
  order, modules = [*_PARAMETERS], _MODULES
  if model.norm_place == 'both':  # the outputs' norms have the usual names of the inputs'
    modules = modules | {'ffn_norm': 'pre_feedforward_layernorm'}
  abstract = transformer.Network(model, config.Compute()).abstract()
  leaves, made = traverse_util.flatten_dict(abstract, sep='/'), {}
  for path in sorted(leaves, key=lambda path: order.index(path.split('/')[-1])):
    part, parameter = path.removeprefix('blocks/').split('/')
    leaf, module, stacked = leaves[path], modules[part], 0
    if path.startswith('blocks/'):
      of_experts = sharding.has_experts(path, leaf.ndim)
      stacked = 1 + of_experts
      module = f'model.layers.{{0}}.{module}' + ('.experts.{1}' if of_experts else '')
    name, ours = f'{module}.{_PARAMETERS[parameter]}', leaf.shape[stacked:]
    is_matrix = name.endswith(('_proj.weight', 'router.weight', HEAD))
    if is_matrix:
      inputs = math.prod(ours[:-1]) if parameter == 'out' else ours[0]
      theirs = math.prod(ours) // inputs, inputs
    elif name == TABLE or name.endswith('_norm.weight') and model.qk_norm != 'all_rms':
      theirs = ours
    else:
      theirs = (math.prod(ours),)
    made[path] = Tensor(name, leaf.shape[:stacked], ours, theirs, is_matrix)
  return made


def renamed(table: Table, parts: Iterable[tuple[str, str]]) -> Table:
  """A table with other parts of names, replaced in this order."""
  for ours, theirs in parts:
    table = {k: one._replace(name=one.name.replace(ours, theirs)) for k, one in table.items()}
  return table


class Piece(NamedTuple):
  """A part of one of our arrays, and the rows of a tensor that it is."""

  path: str
  index: tuple[int, ...]  # layer and expert
  rows: slice | np.ndarray  # or their numbers


def pieces(table: Table) -> dict[str, list[Piece]]:
  """The pieces of every tensor, by its name, in the order of its rows."""
  found: dict[str, list] = {}
  for path, tensor in table.items():
    for index in itertools.product(*map(range, tensor.stacked)):
      found.setdefault(tensor.name.format(*index), []).append((index, path))
  for name, parts in found.items():
    parts.sort(key=lambda part: part[0])  # expert by expert
    stops = [0, *itertools.accumulate(table[path].theirs[0] for _, path in parts)]
    rows = itertools.starmap(slice, itertools.pairwise(stops))
    if '.query_key_value.' in name:  # query, key and value of one head after the other
      heads = table[parts[0][1]].ours[-2]
      rows = np.arange(stops[-1]).reshape(heads, 3, -1).swapaxes(0, 1).reshape(3, -1)
    found[name] = [Piece(path, index, some) for (index, path), some in zip(parts, rows)]
  return found


def shape(table: Table, parts: Iterable[Piece]) -> tuple[int, ...]:
  """The shape of the tensor that has these pieces."""
  shapes = [table[part.path].theirs for part in parts]
  return sum(rows for rows, *_ in shapes), *shapes[0][1:]


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
