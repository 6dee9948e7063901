"""Cohere's checkpoints and ours: the same dense model under other names, in other shapes.

Cohere is the public family that the dense model fits without loss: parallel blocks on one LayerNorm
without bias, SwiGLU, grouped queries, rotary pairs over the whole head. Nothing here reads files;
names and arrays come in and go out, one array of one layer at a time if the caller likes.

Legend: L layers, D model, H query heads, G key-value heads, K head, F FFN, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from bam_jax import config
from bam_jax.errors import UserError

ARCHITECTURE = 'CohereForCausalLM'
_HEAD = 'lm_head.weight'
_TABLE = 'model.embed_tokens.weight'
_WIDTHS = ('float32', 'bfloat16', 'float16')  # what float32 holds without rounding

# Keys of config.json that change nothing about the parameters and what is computed from them.
_IRRELEVANT = frozenset(
  """
  _name_or_path architectures bos_token_id dtype eos_token_id initializer_range
  max_position_embeddings model_max_length model_type pad_token_id pretraining_tp torch_dtype
  transformers_version unk_token_id use_cache
  """.split()
)
# Keys that may stand there with this value and no other; absent, they have it.
_FIXED = {
  'attention_bias': False,
  'attention_dropout': 0.0,
  'hidden_act': 'silu',
  'rope_scaling': None,
}
_SIZES = {
  'vocab_size': 'vocab_size',
  'd_model': 'hidden_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'ffn_dim': 'intermediate_size',
}


class Tensor(NamedTuple):
  """One of our arrays, a layer of it if it has layers, and what it is called over there."""

  name: str  # '{layer}' in it stands for the number of the layer
  ours: tuple[int, ...]
  theirs: tuple[int, ...]  # matrices are (out, in) over there

  @property
  def is_matrix(self) -> bool:
    """Whether the array multiplies tokens, and is therefore transposed over there."""
    return self.name.endswith(('_proj.weight', _HEAD))

  @property
  def has_layers(self) -> bool:
    """Whether there is one of it in each layer."""
    return '{layer}' in self.name


def model_from_hf(config_json: Mapping[str, Any]) -> config.Model:
  """The dense model that a config.json of transformers describes.

  Raises:
    UserError: it names the key that describes another model than ours, or that is not known here
      and is not simply off; what is missing and has no safe default is named too.
  """
  facts = dict(config_json)
  architectures = facts.pop('architectures', None)
  if list(architectures or ()) != [ARCHITECTURE]:
    raise UserError(f'architectures={architectures!r} is not [{ARCHITECTURE!r}], all we import.')
  for key, only in _FIXED.items():
    value = facts.pop(key, only)
    if value != only:
      raise UserError(f'{key}={value!r} is not {only!r}: our dense model has nothing like it.')

  sizes = {ours: _whole(facts, theirs) for ours, theirs in _SIZES.items()}
  heads = sizes['num_heads']
  if facts.get('num_key_value_heads') is None:
    facts['num_key_value_heads'] = heads
  if facts.get('head_dim') is None:
    facts['head_dim'], rest = divmod(sizes['d_model'], heads)
    if rest:
      raise UserError(
        f'hidden_size={sizes["d_model"]} is not a multiple of num_attention_heads={heads}, and '
        'head_dim is not given.'
      )
  model = {
    **sizes,
    'num_kv_heads': _whole(facts, 'num_key_value_heads'),
    'head_dim': _whole(facts, 'head_dim'),
    'rope_theta': _theta(facts),
    'norm_epsilon': _number(facts, 'layer_norm_eps'),
    'logit_scale': _number(facts, 'logit_scale'),
    # transformers leaves these out of the file where they are what they are by default.
    'tied_embeddings': _flag(facts, 'tie_word_embeddings', True),
    'qk_norm': _flag(facts, 'use_qk_norm', False),
  }
  for key, value in facts.items():
    # Whatever is off or empty cannot make it another model: sliding windows, parallel variants.
    if key not in _IRRELEVANT and value not in (None, False):
      raise UserError(
        f'{key}={value!r} is a key that we cannot follow: the import might be another model.'
      )
  return config.Model(**model)


def tensors(model: config.Model) -> dict[str, Tensor]:
  """All the tensors of a dense model by our paths; UserError for a mixture."""
  if model != model.dense():
    raise UserError(f'The model has experts, which {ARCHITECTURE} has not: export a dense run.')
  D, F, V = model.d_model, model.ffn_dim, model.vocab_size
  H, G, K = model.num_heads, model.num_kv_heads, model.head_dim
  layer = 'model.layers.{layer}.'
  out = {
    'embed/table': Tensor(_TABLE, (V, D), (V, D)),
    'blocks/norm/scale': Tensor(layer + 'input_layernorm.weight', (D,), (D,)),
    'blocks/attention/query': Tensor(layer + 'self_attn.q_proj.weight', (D, H, K), (H * K, D)),
    'blocks/attention/key': Tensor(layer + 'self_attn.k_proj.weight', (D, G, K), (G * K, D)),
    'blocks/attention/value': Tensor(layer + 'self_attn.v_proj.weight', (D, G, K), (G * K, D)),
    'blocks/attention/out': Tensor(layer + 'self_attn.o_proj.weight', (H, K, D), (D, H * K)),
    'blocks/ffn/gate': Tensor(layer + 'mlp.gate_proj.weight', (D, F), (F, D)),
    'blocks/ffn/up': Tensor(layer + 'mlp.up_proj.weight', (D, F), (F, D)),
    'blocks/ffn/down': Tensor(layer + 'mlp.down_proj.weight', (F, D), (D, F)),
    'final_norm/scale': Tensor('model.norm.weight', (D,), (D,)),
  }
  if model.qk_norm:
    out |= {
      'blocks/attention/query_scale': Tensor(layer + 'self_attn.q_norm.weight', (H, K), (H, K)),
      'blocks/attention/key_scale': Tensor(layer + 'self_attn.k_norm.weight', (G, K), (G, K)),
    }
  if not model.tied_embeddings:
    out['unembed/kernel'] = Tensor(_HEAD, (D, V), (V, D))
  return out


def names(model: config.Model) -> dict[str, str]:
  """Our paths and the names over there; '{layer}' stands for the number of the layer."""
  return {path: tensor.name for path, tensor in tensors(model).items()}


def to_ours(tensor: Tensor, array: np.ndarray) -> np.ndarray:
  """One array of theirs in our shape, its values and dtype untouched."""
  _check_shape(tensor.name, array, tensor.theirs)
  array = array.T.reshape(tensor.ours) if tensor.is_matrix else array
  return np.ascontiguousarray(array)


def to_hf(tensor: Tensor, array: np.ndarray) -> np.ndarray:
  """One array of ours, of one layer, in their shape; undoes `to_ours`."""
  _check_shape(tensor.name, array, tensor.ours)
  array = array.reshape(tensor.theirs[::-1]).T if tensor.is_matrix else array
  return np.ascontiguousarray(array)


def params_from_state_dict(arrays: Mapping[str, np.ndarray], model: config.Model) -> dict[str, Any]:
  """Our float32 parameters from all the tensors of a Cohere model; each is used once.

  Raises:
    UserError: a tensor is missing, unknown, of another shape, or of a dtype wider than float32.
  """
  left = dict(arrays)
  params = {}
  for path, tensor in tensors(model).items():
    layers = [
      _float32(name, to_ours(tensor._replace(name=name), _take(left, name)))
      for name in _layer_names(tensor, model)
    ]
    params[path] = np.stack(layers) if tensor.has_layers else layers[0]
  # PyTorch lists a tied head although it is the table; a file written from that may hold both.
  if model.tied_embeddings and _HEAD in left:
    if not np.array_equal(left.pop(_HEAD), arrays[_TABLE]):
      raise UserError(f'{_HEAD} is not {_TABLE}, yet tie_word_embeddings says that it is.')
  if left:
    raise UserError(f'{", ".join(sorted(left))}: the model that config.json describes has no such.')
  return traverse_util.unflatten_dict(params, sep='/')


def state_dict_from_params(params: Mapping[str, Any], model: config.Model) -> dict[str, np.ndarray]:
  """The tensors of a Cohere model from our parameters, each used once; dtypes are kept.

  Raises:
    UserError: the model has experts, or an array is missing, unknown or of another shape.
  """
  left = traverse_util.flatten_dict(params, sep='/')
  arrays = {}
  for path, tensor in tensors(model).items():
    array = np.asarray(_take(left, path))
    if tensor.has_layers:
      _check_shape(path, array, (model.num_layers, *tensor.ours))
    layers = array if tensor.has_layers else [array]
    for name, layer in zip(_layer_names(tensor, model), layers, strict=True):
      arrays[name] = to_hf(tensor._replace(name=name), layer)
  if left:
    raise UserError(f'{", ".join(sorted(left))}: {ARCHITECTURE} has no such.')
  return arrays


def _layer_names(tensor: Tensor, model: config.Model) -> list[str]:
  count = model.num_layers if tensor.has_layers else 1
  return [tensor.name.format(layer=layer) for layer in range(count)]


def _take(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
  if name not in arrays:
    raise UserError(f'{name} is missing.')
  return arrays.pop(name)


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
  if array.shape != shape:
    raise UserError(f'{name} has shape {array.shape}; the model wants {shape}.')


def _float32(name: str, array: np.ndarray) -> np.ndarray:
  if array.dtype.name not in _WIDTHS:
    raise UserError(f'{name} has dtype {array.dtype}; float32 would not hold it exactly.')
  return array.astype(np.float32)


def _theta(facts: dict[str, Any]) -> float:
  """The base of RoPE: at the top level in older files, under rope_parameters in newer ones."""
  grouped = dict(facts.pop('rope_parameters', None) or {})
  kind = grouped.pop('rope_type', 'default')
  if kind != 'default':
    raise UserError(f'rope_parameters.rope_type={kind!r} is not "default": we scale no positions.')
  found = []
  for group, key in ((facts, 'rope_theta'), (grouped, 'rope_theta')):
    if group.get(key) is not None:
      found.append(_number(group, key))
  if not found:
    # transformers' own default changed from one release to the next.
    raise UserError('rope_theta is missing, at the top level and under rope_parameters.')
  if len(set(found)) > 1:
    raise UserError(f'rope_theta={found[0]} is {found[1]} under rope_parameters: which is it?')
  for key, value in grouped.items():
    if value is not None:
      raise UserError(f'rope_parameters.{key}={value!r} is a key that we cannot follow.')
  return found[0]


def _pop(facts: dict[str, Any], key: str, fits: Callable[[Any], bool], what: str) -> Any:
  if key not in facts:
    raise UserError(f'{key} is missing.')
  value = facts.pop(key)
  if not fits(value):
    raise UserError(f'{key}={value!r} is not {what}.')
  return value


def _whole(facts: dict[str, Any], key: str) -> int:
  fits = lambda value: type(value) is int and value > 0
  return _pop(facts, key, fits, 'a positive whole number')


def _number(facts: dict[str, Any], key: str) -> float:
  fits = lambda value: type(value) in (int, float) and math.isfinite(value) and value > 0
  return float(_pop(facts, key, fits, 'a positive number'))


def _flag(facts: dict[str, Any], key: str, default: bool) -> bool:
  if facts.get(key) is None:
    facts.pop(key, None)
    return default
  return _pop(facts, key, lambda value: type(value) is bool, 'true or false')
