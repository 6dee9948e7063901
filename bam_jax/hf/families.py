"""The dense families of transformers: how each one's config.json says what our model's fields say.

A family reads a config.json into fields of `config.Model`, and writes those of a model that it can
describe. Keys that a file omits have the values that transformers 5.24 gives them.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bam_jax import config
from bam_jax.config import strict
from bam_jax.config.strict import require
from bam_jax.errors import UserError

LENGTH = 'max_position_embeddings'
# Keys without effect on the parameters or the computation.
_IRRELEVANT = frozenset(
  """
  _name_or_path architectures attention_dropout auto_map bos_token_id dtype embd_pdrop eos_token_id
  expert_sources initializer_range max_position_embeddings model_max_length model_type pad_token_id
  pretraining_tp resid_pdrop rope_scaling_type torch_dtype transformers_version unk_token_id
  upcycling_method use_cache
  """.split()
)
_KINDS = {int: 'a positive whole number', float: 'a positive number', bool: 'true or false'}
_NEEDED = object()


class Facts:
  """A config.json whose keys are taken one by one, so that what is left over is known."""

  def __init__(self, facts: Mapping[str, Any]):
    self._facts = dict(facts)

  def take(self, key: str, kind: type, default: Any = _NEEDED) -> Any:
    """A value of a type; if it is absent or null, the default. UserError if there is none."""
    value = self._facts.pop(key, None)
    if value is None:
      require(default is not _NEEDED, f'{key} is missing.')
      return default
    fits = type(value) is kind or (kind is float and type(value) is int)
    in_range = kind not in (int, float) or 0 < value <= sys.float_info.max
    what = _KINDS.get(kind, f'a {kind.__name__}')
    require(fits and in_range, f'{key}={value!r} is not {what}.')
    return kind(value)

  def has(self, key: str) -> bool:
    """Whether a key has a value other than null."""
    return self._facts.get(key) is not None

  def only(self, key: str, value: Any) -> None:
    """UserError unless a key is absent, null or has this value."""
    found = self._facts.pop(key, None)
    fits = found is None or found == value
    require(fits, f'{key}={found!r} is not {value!r}: our model does not support it.')

  def check_rest(self) -> None:
    """UserError if a key is left that is neither known to be harmless nor turned off."""
    for key, value in self._facts.items():
      harmless = key in _IRRELEVANT or value in (None, False, [], {})
      require(harmless, f'{key}={value!r} is an unsupported key: the imported model might differ.')


class Family(NamedTuple):
  """A dense architecture of transformers."""

  architecture: str
  model_type: str
  read: Callable[[Facts], dict[str, Any]]  # fields of config.Model
  write: Callable[[config.Model], dict[str, Any]]  # keys of config.json beside `_sizes`


def read(family: Family, config_json: Mapping[str, Any]) -> config.Model:
  """The model that a config.json describes; UserError names the key that does not fit."""
  facts = Facts(config_json)
  fields = family.read(facts)
  facts.check_rest()
  return config.Model(**fields)


def write(family: Family, model: config.Model) -> dict[str, Any]:
  """The config.json of a dense model, but for tokens and dtype; `read` gives the model back."""
  sizes = {
    'vocab_size': model.vocab_size,
    'hidden_size': model.d_model,
    'num_hidden_layers': model.num_layers,
    'num_attention_heads': model.num_heads,
    'num_key_value_heads': model.num_kv_heads,
    'intermediate_size': model.ffn_dim,
    'tie_word_embeddings': model.tied_embeddings,
    'hidden_act': 'silu',
    'attention_dropout': 0.0,
    'architectures': [family.architecture],
    'model_type': family.model_type,
  }
  return sizes | family.write(model)


def describes(family: Family, model: config.Model) -> bool:
  """Whether a family's config.json can describe a model."""
  try:
    return read(family, write(family, model)) == model
  except UserError:
    return False


SEQUENTIAL = dict(block='sequential', norm='rmsnorm', rotary_layout='half')


def _sizes(
  facts: Facts, *, eps: float, eps_key: str = 'rms_norm_eps', tied: bool = False,
  kv_heads: int | None = None, head_dim: int | None = None,
) -> dict[str, Any]:  # fmt: skip
  facts.only('hidden_act', 'silu')
  width, heads = facts.take('hidden_size', int), facts.take('num_attention_heads', int)
  whole = head_dim or not width % heads or facts.has('head_dim')
  wrong = f'hidden_size={width} is not a multiple of num_attention_heads={heads}'
  require(whole, f'{wrong}: head_dim is required.')
  return dict(
    vocab_size=facts.take('vocab_size', int),
    d_model=width,
    num_layers=facts.take('num_hidden_layers', int),
    num_heads=heads,
    num_kv_heads=facts.take('num_key_value_heads', int, kv_heads or heads),
    head_dim=facts.take('head_dim', int, head_dim or width // heads),
    ffn_dim=facts.take('intermediate_size', int),
    tied_embeddings=facts.take('tie_word_embeddings', bool, tied),
    norm_epsilon=facts.take(eps_key, float, eps),
  )


# RoPE: old files have rope_theta and rope_scaling, new ones rope_parameters.

_SCALINGS = {
  'linear': {'factor': 'factor'},
  'llama3': {
    'factor': 'factor', 'original_max_position_embeddings': 'original_length',
    'low_freq_factor': 'low', 'high_freq_factor': 'high',
  },
  'yarn': {
    'factor': 'factor', 'original_max_position_embeddings': 'original_length',
    'beta_fast': 'beta_fast', 'beta_slow': 'beta_slow', 'attention_factor': 'attention_factor',
  },
}  # fmt: skip


def rope(facts: Facts, theta: float | None) -> dict[str, Any]:
  """Base and perhaps scaling; `theta` is the default, None if there is none that is safe."""
  top = facts.take('rope_theta', float, None)
  groups = [facts.take(key, dict, {}) for key in ('rope_parameters', 'rope_scaling')]
  thetas = [top, *(_theta(group) for group in groups)]
  found = [value for value in thetas if value is not None]
  where = 'rope_theta, at the top level and under rope_parameters'
  require(found or theta, f'{where}, is missing.')
  require(len(set(found)) < 2, f'{where}, is given twice, with different values: {found}.')
  given = [_scaling(group, facts) for group in groups if group]
  scalings = list(dict.fromkeys(given))
  require(len(scalings) < 2, 'rope_parameters and rope_scaling differ: remove one of them.')
  fields = dict(rope_theta=found[0] if found else theta)
  return fields | (dict(rope_scaling=scalings[0]) if scalings else {})


def _theta(group: Mapping[str, Any]) -> float | None:
  return Facts(group).take('rope_theta', float, None)


def _scaling(group: Mapping[str, Any], facts: Facts) -> config.RopeScaling | None:
  rest = {k: v for k, v in group.items() if k not in ('rope_theta', 'partial_rotary_factor')}
  kinds = {rest.pop(key) for key in ('rope_type', 'type') if key in rest} or {'default'}
  kind = kinds.pop()
  wrong = f"rope_type={kind!r} changes with a text's length, or is unknown"
  known = not kinds and kind in ('default', *_SCALINGS)
  require(known, f'{wrong}: default, linear, llama3 and yarn can be.')
  keys = _SCALINGS.get(kind, {})
  unknown = [key for key, value in rest.items() if key not in keys and value is not None]
  require(not unknown, f'{(unknown or [""])[0]} of rope_type={kind!r} is an unsupported key.')
  if kind == 'default':
    return None
  values = Facts(rest)
  fields = {'factor': values.take('factor', float)}
  fields |= {ours: values.take(key, float, None) for key, ours in keys.items() if key != 'factor'}
  fields = {ours: value for ours, value in fields.items() if value is not None}
  if 'original_max_position_embeddings' in keys:
    length = int(fields.get('original_length') or facts.take(LENGTH, int))
    fields['original_length'] = length
  return config.RopeScaling(kind, **fields)


def rope_json(theta: float, scaling: config.RopeScaling | None, **more) -> dict[str, Any]:
  """The keys of both forms, which readers of all versions agree on."""
  group: dict[str, Any] = {'rope_type': 'default', 'rope_theta': theta, **more}
  if scaling:
    keys = _SCALINGS[scaling.kind]
    group |= {'rope_type': scaling.kind}
    group |= {key: getattr(scaling, ours) for key, ours in keys.items() if getattr(scaling, ours)}
  return {'rope_theta': theta, 'rope_parameters': group, 'rope_scaling': group if scaling else None}


# Sliding windows.


def _windows(facts: Facts, fields: dict[str, Any], default: Callable[[int], bool], window) -> dict:
  """`layer_types` and `window`; `default` says of a layer's number whether it slides."""
  count = fields['num_layers']
  size = facts.take('sliding_window', int, window)
  layers = facts.take('layer_types', list, None)
  if layers is None:
    layers = ['sliding_attention' if default(n) else 'full_attention' for n in range(count)]
  known = len(layers) == count and set(layers) <= {'sliding_attention', 'full_attention'}
  require(known, f'layer_types={layers!r} does not list num_hidden_layers={count} layers.')
  if 'sliding_attention' not in layers:
    return {}
  require(size, 'sliding_window is null, but layer_types has sliding_attention.')
  return dict(layer_types=tuple(name.removesuffix('_attention') for name in layers), window=size)


def _windows_json(model: config.Model) -> dict[str, Any]:
  layers = model.layer_types or ('full',) * model.num_layers
  window = model.window or None
  return {'layer_types': [f'{kind}_attention' for kind in layers], 'sliding_window': window}


def _biases(facts: Facts) -> dict[str, Any]:
  facts.only('mlp_bias', False)
  return dict(biases='attention') if facts.take('attention_bias', bool, False) else {}


def _llama(facts: Facts, **sizes) -> dict[str, Any]:
  fields = _sizes(facts, **{'eps': 1e-6, **sizes})
  return fields | SEQUENTIAL | rope(facts, 1e4) | _biases(facts)


def _llama_json(model: config.Model) -> dict[str, Any]:
  return {
    'head_dim': model.head_dim,
    'rms_norm_eps': model.norm_epsilon,
    'attention_bias': model.biases == 'attention',
    **rope_json(model.rope_theta, model.rope_scaling),
  }


def _mistral(facts: Facts) -> dict[str, Any]:
  # An absent window is 4,096 tokens, null is none.
  given = 'sliding_window' in facts._facts
  window = facts.take('sliding_window', int, None if given else 4096)
  fields = _llama(facts, kv_heads=8)
  if not window:
    return fields
  return fields | dict(layer_types=('sliding',) * fields['num_layers'], window=window)


def _mistral_json(model: config.Model) -> dict[str, Any]:
  require(len(set(model.layer_types)) < 2, 'Mistral has one kind of layer.')
  facts = {k: v for k, v in _llama_json(model).items() if k != 'attention_bias'}
  return facts | {'sliding_window': model.window or None}


def _qwen_windows(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  first = facts.take('max_window_layers', int, 28)
  if not facts.take('use_sliding_window', bool, False):
    facts.take('sliding_window', int, None)
    return _windows(facts, fields, lambda number: False, None)
  return _windows(facts, fields, lambda number: number >= first, 4096)


def _qwen_windows_json(model: config.Model) -> dict[str, Any]:
  return _windows_json(model) | {'use_sliding_window': bool(model.window), 'max_window_layers': 28}


def _qwen2(facts: Facts) -> dict[str, Any]:
  facts.only('use_mrope', False)
  fields = _llama(facts) | dict(biases='qkv')
  return fields | _qwen_windows(facts, fields)


def _qwen2_json(model: config.Model) -> dict[str, Any]:
  facts = _llama_json(model) | _qwen_windows_json(model)
  return {key: value for key, value in facts.items() if key != 'attention_bias'}


def _qwen3(facts: Facts) -> dict[str, Any]:
  fields = _llama(facts, head_dim=128) | dict(qk_norm='head_rms')
  return fields | _qwen_windows(facts, fields)


def _qwen3_json(model: config.Model) -> dict[str, Any]:
  return _llama_json(model) | _qwen_windows_json(model)


def _smollm3(facts: Facts) -> dict[str, Any]:
  fields = _sizes(facts, eps=1e-6, tied=True, kv_heads=4) | SEQUENTIAL | rope(facts, 2e6)
  fields |= _biases(facts) | _qwen_windows(facts, fields)
  every, count = facts.take('no_rope_layer_interval', int, 4), fields['num_layers']
  default = [int((n + 1) % every != 0) for n in range(count)]  # 1: this layer rotates
  turns = facts.take('no_rope_layers', list, default)
  wrong = f'no_rope_layers={turns!r} does not list num_hidden_layers={count} layers.'
  require(len(turns) == count, wrong)
  return fields | dict(nope_layers=tuple(n for n, turn in enumerate(turns) if not turn))


def _smollm3_json(model: config.Model) -> dict[str, Any]:
  turns = [int(n not in model.nope_layers) for n in range(model.num_layers)]
  facts = _llama_json(model) | _qwen_windows_json(model)
  return facts | {'no_rope_layers': turns, 'no_rope_layer_interval': 4}


def _olmo2(facts: Facts) -> dict[str, Any]:
  facts.only('clip_qkv', None)
  fields = _llama(facts, eps=1e-5)
  return fields | dict(norm_place='post', qk_norm='all_rms')


def _olmo3(facts: Facts) -> dict[str, Any]:
  nested = facts.take('rope_parameters', dict, None)
  sizes = dict(eps=1e-5, kv_heads=None)
  fields = _sizes(facts, **sizes) | SEQUENTIAL | dict(norm_place='post', qk_norm='all_rms')
  fields |= _biases(facts) | _windows(facts, fields, lambda n: (n + 1) % 4 != 0, 4096)
  if nested is None:  # of old files transformers rotates sliding layers by this base, unscaled
    fields |= rope(facts, 5e5)
    sliding = 5e5
  else:
    is_nested = 'full_attention' in nested
    full = nested['full_attention'] if is_nested else nested
    slid = nested.get('sliding_attention', full) if is_nested else nested
    facts.take('rope_theta', float, None), facts.take('rope_scaling', dict, None)
    fields |= rope(Facts({'rope_parameters': full}), 5e5)
    scaled = slid.get('rope_type', 'default') != 'default'
    require(not scaled, 'rope_parameters scales sliding layers, which our model does not support.')
    sliding = _theta(slid) or 5e5
  if 'layer_types' in fields and (fields.get('rope_scaling') or sliding != fields['rope_theta']):
    fields['window_rope_theta'] = sliding
  return fields


def _olmo3_json(model: config.Model) -> dict[str, Any]:
  facts = _llama_json(model) | _windows_json(model)
  group = facts['rope_parameters']
  sliding = {'rope_type': 'default', 'rope_theta': model.window_rope_theta or model.rope_theta}
  nested = {'full_attention': group, 'sliding_attention': sliding}
  return {k: v for k, v in facts.items() if k != 'rope_scaling'} | {'rope_parameters': nested}


def _phi3(facts: Facts) -> dict[str, Any]:
  part = facts.take('partial_rotary_factor', float, None)
  for group in ('rope_parameters', 'rope_scaling'):
    part = part or (facts._facts.get(group) or {}).get('partial_rotary_factor')
  facts.take('original_max_position_embeddings', int, None)
  window = facts.take('sliding_window', int, None)
  fields = _sizes(facts, eps=1e-5) | SEQUENTIAL | rope(facts, 1e4)
  if part and part != 1:
    fields['rotary_dim'] = int(fields['head_dim'] * part)
  if window:
    fields |= dict(layer_types=('sliding',) * fields['num_layers'], window=window)
  return fields


def _phi3_json(model: config.Model) -> dict[str, Any]:
  require(len(set(model.layer_types)) < 2, 'Phi-3 has one kind of layer.')
  part = (model.rotary_dim or model.head_dim) / model.head_dim
  facts = _llama_json(model) | {'partial_rotary_factor': part}
  facts |= rope_json(model.rope_theta, model.rope_scaling, partial_rotary_factor=part)
  unused = ('attention_bias', 'head_dim')
  facts = {key: value for key, value in facts.items() if key not in unused}
  return facts | {'sliding_window': model.window or None}


_GRANITE = {
  'embedding_scale': 'embedding_multiplier', 'residual_scale': 'residual_multiplier',
  'attention_scale': 'attention_multiplier',
}  # fmt: skip


def _granite(facts: Facts) -> dict[str, Any]:
  scales = {ours: facts.take(key, float, 1.0) for ours, key in _GRANITE.items()}
  return _llama(facts) | scales | dict(logit_scale=1 / facts.take('logits_scaling', float, 1.0))


def _granite_json(model: config.Model) -> dict[str, Any]:
  scales = {key: getattr(model, ours) for ours, key in _GRANITE.items()}
  scales['attention_multiplier'] = model.attention_scale or model.head_dim**-0.5
  return _llama_json(model) | scales | {'logits_scaling': 1 / model.logit_scale}


def _cohere(facts: Facts) -> dict[str, Any]:
  for key, value in {
    'attention_bias': False, 'position_embedding_type': 'rope_gptj', 'rotary_pct': 1.0,
    'use_embedding_sharing': True, 'use_gated_activation': True, 'use_parallel_block': True,
  }.items():  # fmt: skip
    facts.only(key, value)
  fields = _sizes(facts, eps=1e-5, eps_key='layer_norm_eps', tied=True)
  fields['logit_scale'] = facts.take('logit_scale', float, 0.0625)
  fields |= rope(facts, None)  # its default changed from one release to the next
  normed = facts.take('use_qk_norm', bool, False)
  return fields | (dict(qk_norm='head_layernorm') if normed else {})


def _cohere_json(model: config.Model) -> dict[str, Any]:
  return {
    'head_dim': model.head_dim,
    'layer_norm_eps': model.norm_epsilon,
    'logit_scale': model.logit_scale,
    'use_qk_norm': model.qk_norm == 'head_layernorm',
    'attention_bias': False,
    **rope_json(model.rope_theta, model.rope_scaling),
  }


def _cohere2(facts: Facts) -> dict[str, Any]:
  facts.take('head_dim', int, None)  # which transformers ignores
  every = facts.take('sliding_window_pattern', int, 4)
  facts.only('use_qk_norm', False)
  if not any(facts.has(key) for key in ('rope_theta', 'rope_parameters')):
    facts._facts['rope_theta'] = 1e4
  fields = _cohere(facts)
  fields |= _windows(facts, fields, lambda number: (number + 1) % every != 0, 4096)
  layers = fields.get('layer_types', ('full',) * fields['num_layers'])
  return fields | dict(nope_layers=tuple(n for n, kind in enumerate(layers) if kind == 'full'))


def _cohere2_json(model: config.Model) -> dict[str, Any]:
  facts = _cohere_json(model) | _windows_json(model)
  return {k: v for k, v in facts.items() if k not in ('use_qk_norm', 'head_dim')}


# Fields under our own names where transformers has none.
_OWN = (
  'block', 'norm', 'norm_place', 'qk_norm', 'biases', 'rotary_layout', 'rotary_dim', 'nope_layers',
  'window_rope_theta', 'attention_scale', 'embedding_scale', 'residual_scale', 'logit_scale',
)  # fmt: skip


def _bam(facts: Facts) -> dict[str, Any]:
  fields = _sizes(facts, eps=1e-5, eps_key='layer_norm_eps', tied=True)
  own = {name: facts._facts.pop(name) for name in _OWN if facts.has(name)}
  if facts.take('use_qk_norm', bool, False):  # of files from before there were several kinds
    own['qk_norm'] = 'head_layernorm'
  fields = vars(strict.from_dict(config.Model, fields | own, 'config.json'))
  return fields | rope(facts, None) | _windows(facts, fields, lambda number: False, None)


def _bam_json(model: config.Model) -> dict[str, Any]:
  return {
    'head_dim': model.head_dim,
    'layer_norm_eps': model.norm_epsilon,
    'rope_parameters': rope_json(model.rope_theta, model.rope_scaling)['rope_parameters'],
    **_windows_json(model),
    **{name: getattr(model, name) for name in _OWN},
  }


# A model of any family, computed by our own code, which adds experts.
BAM = Family('BamForCausalLM', 'bam', _bam, _bam_json)
# In the order in which a model's own class is looked for.
FAMILIES = [
  Family('CohereForCausalLM', 'cohere', _cohere, _cohere_json),
  Family('Cohere2ForCausalLM', 'cohere2', _cohere2, _cohere2_json),
  Family('LlamaForCausalLM', 'llama', _llama, _llama_json),
  Family('MistralForCausalLM', 'mistral', _mistral, _mistral_json),
  Family('Qwen2ForCausalLM', 'qwen2', _qwen2, _qwen2_json),
  Family('Qwen3ForCausalLM', 'qwen3', _qwen3, _qwen3_json),
  Family('SmolLM3ForCausalLM', 'smollm3', _smollm3, _smollm3_json),
  Family('Olmo2ForCausalLM', 'olmo2', _olmo2, _llama_json),
  Family('Olmo3ForCausalLM', 'olmo3', _olmo3, _olmo3_json),
  Family('Phi3ForCausalLM', 'phi3', _phi3, _phi3_json),
  Family('GraniteForCausalLM', 'granite', _granite, _granite_json),
]
