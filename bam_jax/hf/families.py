"""The dense families of transformers: how each one's config.json says what our model's fields say.

A family reads a config.json into fields of `config.Model`, and writes those of a model that it can
describe. Keys that a file omits have the values that transformers 5.24 gives them.
"""

import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bam_jax import config
from bam_jax.config import strict
from bam_jax.config.strict import require
from bam_jax.errors import UserError

LENGTH = 'max_position_embeddings'
# Keys without effect on the parameters or the computation.
_IRRELEVANT = frozenset(
  """
  _name_or_path architectures attention_dropout auto_map bos_token_id classifier_dropout dtype
  embd_pdrop eos_token_id expert_sources hidden_dropout initializer_range max_position_embeddings
  model_max_length model_type pad_token_id
  pretraining_tp resid_pdrop rope_scaling_type torch_dtype transformers_version unk_token_id
  upcycling_method use_cache
  """.split()
)
_ACTIVATIONS = {'swiglu': 'silu', 'geglu_tanh': 'gelu_pytorch_tanh', 'gelu': 'gelu'}
_KINDS = {int: 'a positive whole number', float: 'a positive number', bool: 'true or false'}
_TYPES = typing.get_type_hints(config.Model)
_NEEDED = object()


class Facts(dict[str, Any]):
  """A config.json whose keys are taken one by one, so that what is left over is known."""

  def take(self, key: str, kind: type, default: Any = _NEEDED) -> Any:
    """A value of a type; if it is absent or null, the default. UserError if there is none."""
    value = self.pop(key, None)
    if value is None:
      require(default is not _NEEDED, f'{key} is missing.')
      return default
    fits = type(value) is kind or (kind is float and type(value) is int)
    fits = fits and (kind not in (int, float) or 0 < value <= sys.float_info.max)
    require(fits, f'{key}={value!r} is not {_KINDS.get(kind, f"a {kind.__name__}")}.')
    return kind(value)


class Part(NamedTuple):
  """Keys of config.json that do not say a field as it is."""

  read: Callable[[Facts, dict[str, Any]], dict[str, Any]]  # takes keys; the fields so far -> more
  write: Callable[[config.Model], dict[str, Any]]


class Family(NamedTuple):
  """A dense architecture of transformers."""

  architecture: str
  model_type: str
  keys: dict[str, str]  # fields of config.Model, and the keys that say them as they are
  fields: dict[str, Any]  # values of fields that no key says, or if a file omits their key
  parts: Sequence[Part]
  allowed: dict[str, Sequence] = {'hidden_act': ['silu']}  # other keys: values that change nothing
  renamed: Sequence[tuple[str, str]] = ()  # parts of our tensors' names, and what they are there


def read(family: Family, config_json: Mapping[str, Any]) -> config.Model:
  """The model that a config.json describes; UserError names the key that does not fit."""
  facts = Facts(config_json)
  fields = {'num_kv_heads': None, 'head_dim': None, **family.fields}
  for field, key in family.keys.items():
    fields[field] = facts.take(key, _TYPES[field], fields.get(field, _NEEDED))
  width, heads = fields['d_model'], fields['num_heads']
  wrong = f'hidden_size={width} is not a multiple of num_attention_heads={heads}'
  require(fields['head_dim'] or width % heads == 0, f'{wrong}: head_dim is required.')
  fields['num_kv_heads'] = fields['num_kv_heads'] or heads
  fields['head_dim'] = fields['head_dim'] or width // heads
  for part in family.parts:
    fields |= part.read(facts, fields)
  for key, value in facts.items():
    harmless = (None, *family.allowed.get(key, (False, [], {})))
    wrong = f'{key}={value!r} is not supported: the imported model might differ.'
    require(key in _IRRELEVANT or value in harmless, wrong)
  return config.Model(**fields)


def write(family: Family, model: config.Model) -> dict[str, Any]:
  """The config.json of a dense model, but for tokens and dtype; `read` gives the model back."""
  facts = {key: getattr(model, field) for field, key in family.keys.items()}
  for part in family.parts:
    facts |= part.write(model)
  return facts | {
    'hidden_act': _ACTIVATIONS[model.ffn],
    'attention_dropout': 0.0,
    'architectures': [family.architecture],
    'model_type': family.model_type,
  }


def describes(family: Family, model: config.Model) -> bool:
  """Whether a family's config.json can describe a model."""
  try:
    return read(family, write(family, model)) == model
  except UserError:
    return False


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
  groups = [facts.take(key, dict, {}) for key in ('rope_parameters', 'rope_scaling')]
  thetas = [one.take('rope_theta', float, None) for one in (facts, *map(Facts, groups))]
  found = [value for value in thetas if value is not None]
  where = 'rope_theta, at the top level and under rope_parameters'
  require(found or theta, f'{where}, is missing.')
  require(len(set(found)) < 2, f'{where}, is given twice, with different values: {found}.')
  scalings = list(dict.fromkeys(_scaling(group, facts) for group in groups if group))
  require(len(scalings) < 2, 'rope_parameters and rope_scaling differ: remove one of them.')
  fields = dict(rope_theta=found[0] if found else theta)
  return fields | (dict(rope_scaling=scalings[0]) if scalings else {})


def _scaling(group: Mapping[str, Any], facts: Facts) -> config.RopeScaling | None:
  rest = {k: v for k, v in group.items() if k not in ('rope_theta', 'partial_rotary_factor')}
  kinds = {rest.pop(key) for key in ('rope_type', 'type') if key in rest} or {'default'}
  kind = kinds.pop()
  wrong = f"rope_type={kind!r} changes with a text's length, or is unknown"
  known = not kinds and kind in ('default', *_SCALINGS)
  require(known, f'{wrong}: default, linear, llama3 and yarn can be imported.')
  keys = _SCALINGS.get(kind, {})
  unknown = [key for key, value in rest.items() if key not in keys and value is not None]
  require(not unknown, f'{(unknown or [""])[0]} of rope_type={kind!r} is an unsupported key.')
  if kind == 'default':
    return None
  values = Facts(rest)
  fields = {'factor': values.take('factor', float)}
  fields |= {
    ours: values.take(key, float) for key, ours in keys.items() if values.get(key) is not None
  }
  if 'original_max_position_embeddings' in keys:
    fields['original_length'] = int(fields.get('original_length') or facts.take(LENGTH, int))
  return config.RopeScaling(kind, **fields)


def rope_json(theta: float, scaling: config.RopeScaling | None, **more) -> dict[str, Any]:
  """The keys of both forms, which readers of all versions agree on."""
  group = {'rope_type': scaling.kind if scaling else 'default', 'rope_theta': theta, **more}
  keys = _SCALINGS[scaling.kind] if scaling else {}
  group |= {key: getattr(scaling, ours) for key, ours in keys.items() if getattr(scaling, ours)}
  return {'rope_theta': theta, 'rope_parameters': group, 'rope_scaling': group if scaling else None}


_ROPE = Part(
  lambda facts, fields: rope(facts, fields.get('rope_theta')),
  lambda model: rope_json(model.rope_theta, model.rope_scaling),
)


def _read_nested_rope(
  facts: Facts, fields: dict[str, Any], theta: float = 5e5, sliding: float = 5e5
) -> dict[str, Any]:
  nested = facts.take('rope_parameters', dict, None)
  if nested is None:  # of old files transformers rotates sliding layers by this base, unscaled
    found = rope(facts, theta)
  else:
    facts |= {'rope_theta': None, 'rope_scaling': None}
    full = nested.get('full_attention', nested)
    slid = nested.get('sliding_attention', full)
    found = rope(Facts(rope_parameters=full), theta)
    scaled = slid.get('rope_type', 'default') != 'default'
    require(not scaled, 'rope_parameters scales sliding layers, which our model does not support.')
    sliding = Facts(slid).take('rope_theta', float, sliding)
  if 'layer_types' in fields and (found.get('rope_scaling') or sliding != found['rope_theta']):
    found['window_rope_theta'] = sliding
  return found


def _write_nested_rope(model: config.Model) -> dict[str, Any]:
  full = _ROPE.write(model)['rope_parameters']
  sliding = {'rope_type': 'default', 'rope_theta': model.window_rope_theta or model.rope_theta}
  nested = {'full_attention': full, 'sliding_attention': sliding}
  return {'rope_theta': model.rope_theta, 'rope_parameters': nested}


def _read_phi3_rope(facts: Facts, fields: dict[str, Any], theta: float = 1e4) -> dict[str, Any]:
  facts.pop('original_max_position_embeddings', None)
  part = facts.take('partial_rotary_factor', float, None)
  for group in ('rope_parameters', 'rope_scaling'):
    part = part or Facts(facts).take(group, dict, {}).get('partial_rotary_factor')
  partial = dict(rotary_dim=int(fields['head_dim'] * part)) if part and part != 1 else {}
  return partial | rope(facts, theta)


def _read_neox_rope(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  part, theta = facts.take('rotary_pct', float, 0.25), facts.take('rotary_emb_base', float, 1e4)
  groups = [facts.get(key) or {} for key in ('rope_parameters', 'rope_scaling')]
  if not any('partial_rotary_factor' in group for group in groups):
    facts['partial_rotary_factor'] = part
  return _read_phi3_rope(facts, fields, theta)


def _write_neox_rope(model: config.Model) -> dict[str, Any]:
  written = _write_phi3_rope(model)
  part = written['partial_rotary_factor']
  return written | {'rotary_pct': part, 'rotary_emb_base': model.rope_theta}


def _read_neox_block(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  parallel = facts.take('use_parallel_residual', bool, True)
  return {'block': 'parallel_two_norms' if parallel else 'sequential'}


def _write_neox_block(model: config.Model) -> dict[str, Any]:
  return {'use_parallel_residual': model.block != 'sequential', 'attention_bias': True}


def _write_phi3_rope(model: config.Model) -> dict[str, Any]:
  part = {'partial_rotary_factor': (model.rotary_dim or model.head_dim) / model.head_dim}
  return part | rope_json(model.rope_theta, model.rope_scaling, **part)


def _read_gemma3_rope(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  return _read_nested_rope(facts, fields, 1e6, facts.take('rope_local_base_freq', float, 1e4))


def _write_gemma3_rope(model: config.Model) -> dict[str, Any]:
  sliding = {'rope_local_base_freq': model.window_rope_theta or model.rope_theta}
  return _write_nested_rope(model) | sliding


# Sliding windows.


def _read_windows(facts: Facts, fields: dict[str, Any], slides=lambda number: False, window=None):
  """`layer_types` and `window`; without layer_types, `slides` says of a layer's number."""
  count = fields['num_layers']
  size = facts.take('sliding_window', int, window)
  default = [('sliding' if slides(n) else 'full') + '_attention' for n in range(count)]
  layers = facts.take('layer_types', list, default)
  known = len(layers) == count and set(layers) <= {'sliding_attention', 'full_attention'}
  require(known, f'layer_types={layers!r} does not list num_hidden_layers={count} layers.')
  if 'sliding_attention' not in layers:
    return {}
  require(size, 'sliding_window is null, but layer_types has sliding_attention.')
  return dict(layer_types=tuple(name.removesuffix('_attention') for name in layers), window=size)


def _write_windows(model: config.Model) -> dict[str, Any]:
  layers = model.layer_types or ('full',) * model.num_layers
  window = model.window or None
  return {'layer_types': [f'{kind}_attention' for kind in layers], 'sliding_window': window}


def _read_olmo3_windows(facts: Facts, fields: dict[str, Any], every: int = 4) -> dict[str, Any]:
  return _read_windows(facts, fields, lambda number: (number + 1) % every != 0, 4096)


def _read_cohere2_windows(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  found = _read_olmo3_windows(facts, fields, facts.take('sliding_window_pattern', int, 4))
  layers = found.get('layer_types', ('full',) * fields['num_layers'])
  found['nope_layers'] = tuple(n for n, kind in enumerate(layers) if kind == 'full')
  # transformers ignores the key.
  return found | dict(head_dim=fields['d_model'] // fields['num_heads'])


def _read_qwen_windows(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  first = facts.take('max_window_layers', int, 28)
  if facts.take('use_sliding_window', bool, False):
    return _read_windows(facts, fields, lambda number: number >= first, 4096)
  facts.take('sliding_window', int, None)
  return _read_windows(facts, fields)


def _all_windows(default: int | None) -> Part:
  """A window of all layers or of none; `default` if the key is absent, while null is none."""

  def read_window(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
    window = facts.take('sliding_window', int, facts.get('sliding_window', default))
    return dict(layer_types=('sliding',) * fields['num_layers'], window=window) if window else {}

  return Part(read_window, lambda model: {'sliding_window': model.window or None})


def _write_qwen_windows(model: config.Model) -> dict[str, Any]:
  used = {'use_sliding_window': bool(model.window), 'max_window_layers': 28}
  return _write_windows(model) | used


_QWEN_WINDOWS = Part(_read_qwen_windows, _write_qwen_windows)


# Other keys.


def _flag(key: str, field: str, value: str) -> Part:
  """A key that is true if a field has a value."""

  def read_flag(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
    return {field: value} if facts.take(key, bool, False) else {}

  return Part(read_flag, lambda model: {key: getattr(model, field) == value})


def _read_nope_layers(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  every = facts.take('no_rope_layer_interval', int, 4)
  default = [(n + 1) % every for n in range(fields['num_layers'])]  # 0: it does not rotate
  turns = facts.take('no_rope_layers', list, default)
  require(len(turns) == len(default), f'no_rope_layers={turns!r} does not list every layer.')
  return dict(nope_layers=tuple(n for n, turn in enumerate(turns) if not turn))


def _write_nope_layers(model: config.Model) -> dict[str, Any]:
  turns = [int(n not in model.nope_layers) for n in range(model.num_layers)]
  return {'no_rope_layers': turns, 'no_rope_layer_interval': 4}


def _read_mlp_bias(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  biased = fields.get('biases') == 'attention' and facts.take('mlp_bias', bool, False)
  return {'biases': 'all'} if biased else {}


def _write_mlp_bias(model: config.Model) -> dict[str, Any]:
  return {'mlp_bias': model.biases == 'all', 'attention_bias': model.biases in ('attention', 'all')}


def _gemma(attention_cap: float | None, logit_cap: float | None, every: int) -> list[Part]:
  """Scales, caps and windows; caps are those of absent keys, null is none."""
  caps = {
    'attention_cap': ('attn_logit_softcapping', attention_cap),
    'logit_cap': ('final_logit_softcapping', logit_cap),
  }

  def read_scales(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
    scalar = facts.take('query_pre_attn_scalar', int, 256)
    found = {
      field: facts.take(key, float, facts.get(key, default)) or 0.0
      for field, (key, default) in caps.items()
    }
    return found | dict(attention_scale=scalar**-0.5, embedding_scale=fields['d_model'] ** 0.5)

  def write_scales(model: config.Model) -> dict[str, Any]:
    scalar = round(model.attention_scale**-2) if model.attention_scale else 0
    found = {key: getattr(model, field) or None for field, (key, _) in caps.items()}
    return found | {'query_pre_attn_scalar': scalar, 'hidden_activation': 'gelu_pytorch_tanh'}

  def read_windows(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
    own = facts.take('_sliding_window_pattern', int, every)
    pattern = facts.take('sliding_window_pattern', int, own)
    return _read_olmo3_windows(facts, fields, pattern)

  return [Part(read_scales, write_scales), Part(read_windows, _write_windows), _BIASES]


_MLP_BIAS = Part(_read_mlp_bias, _write_mlp_bias)
_BIASES = _flag('attention_bias', 'biases', 'attention')
_LOGITS_SCALING = Part(
  lambda facts, fields: dict(logit_scale=1 / facts.take('logits_scaling', float, 1.0)),
  lambda model: {'logits_scaling': 1 / model.logit_scale},
)


# Fields under our own names where transformers has none.
_OWN = (
  'block', 'norm', 'norm_place', 'qk_norm', 'biases', 'rotary_layout', 'rotary_dim', 'nope_layers',
  'window_rope_theta', 'attention_scale', 'embedding_scale', 'residual_scale', 'logit_scale', 'ffn',
  'attention_cap', 'logit_cap',
)  # fmt: skip


def _read_own(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  own = {name: facts.pop(name) for name in _OWN if facts.get(name) is not None}
  if facts.take('use_qk_norm', bool, False):  # of files from before there were several kinds
    own['qk_norm'] = 'head_layernorm'
  fields = vars(strict.from_dict(config.Model, fields | own, 'config.json'))
  return fields | rope(facts, None)


def _write_own(model: config.Model) -> dict[str, Any]:
  rotation = _ROPE.write(model)['rope_parameters']
  return {'rope_parameters': rotation, **{name: getattr(model, name) for name in _OWN}}


_SIZES = dict(
  vocab_size='vocab_size', d_model='hidden_size', num_layers='num_hidden_layers',
  num_heads='num_attention_heads', num_kv_heads='num_key_value_heads', head_dim='head_dim',
  ffn_dim='intermediate_size', tied_embeddings='tie_word_embeddings',
)  # fmt: skip
_LAYERNORM = _SIZES | dict(norm_epsilon='layer_norm_eps')
_COHERE_KEYS = _LAYERNORM | dict(logit_scale='logit_scale')
# Without rope_theta, whose default changed from one release to the next.
_COHERE = dict(tied_embeddings=True, norm_epsilon=1e-5, logit_scale=0.0625)
_COHERE_ALLOWED = dict(
  hidden_act=['silu'], position_embedding_type=['rope_gptj'], rotary_pct=[1.0],
  use_embedding_sharing=[True], use_gated_activation=[True], use_parallel_block=[True],
)  # fmt: skip
_RMSNORM = _SIZES | dict(norm_epsilon='rms_norm_eps')
_LLAMA = dict(
  block='sequential', norm='rmsnorm', rotary_layout='half', tied_embeddings=False,
  norm_epsilon=1e-6, rope_theta=1e4,
)  # fmt: skip
_OLMO = _LLAMA | dict(norm_epsilon=1e-5, norm_place='post', qk_norm='all_rms')
_GRANITE_KEYS = _RMSNORM | dict(
  embedding_scale='embedding_multiplier', residual_scale='residual_multiplier',
  attention_scale='attention_multiplier',
)  # fmt: skip
_NEOX_KEYS = {k: v for k, v in _LAYERNORM.items() if k not in ('num_kv_heads', 'head_dim')}
_NEOX = dict(
  norm='layernorm_bias', rotary_layout='half', biases='all', ffn='gelu', tied_embeddings=False,
  norm_epsilon=1e-5,
)  # fmt: skip
_QKV = tuple((f'.{letter}_proj', '.qkv_proj') for letter in 'qkv')
_PHI3_NAMES = *_QKV, ('.gate_proj', '.gate_up_proj'), ('.up_proj', '.gate_up_proj')
_NEOX_NAMES = *_QKV, *{
  'self_attn.qkv_proj': 'attention.query_key_value', 'self_attn.o_proj': 'attention.dense',
  'up_proj': 'dense_h_to_4h', 'down_proj': 'dense_4h_to_h', 'model.layers': 'gpt_neox.layers',
  'model.embed_tokens': 'gpt_neox.embed_in', 'model.norm': 'gpt_neox.final_layer_norm',
  'lm_head': 'embed_out',
}.items()  # fmt: skip
_GEMMA = _LLAMA | dict(
  norm='rmsnorm_plus_one', norm_place='both', ffn='geglu_tanh', tied_embeddings=True,
  num_kv_heads=4, head_dim=256,
)  # fmt: skip
_GEMMA_ALLOWED = dict.fromkeys(('hidden_act', 'hidden_activation'), ['gelu_pytorch_tanh'])
_GEMMA_ALLOWED |= dict(cache_implementation=['hybrid'])

_GEMMA3 = Family(
  'Gemma3ForCausalLM', 'gemma3_text', _RMSNORM, _GEMMA | dict(qk_norm='head_rms'),
  [*_gemma(None, None, 6), Part(_read_gemma3_rope, _write_gemma3_rope)], _GEMMA_ALLOWED,
)  # fmt: skip
# The text model of one that sees images, whose file omits what is as in transformers.
GEMMA3_IMAGES = _GEMMA3._replace(
  architecture='Gemma3ForConditionalGeneration',
  fields=_GEMMA3.fields | dict(
    vocab_size=262_208, d_model=2304, num_layers=26, num_heads=8, ffn_dim=9216
  ),
  renamed=[('model.', 'language_model.model.'), ('lm_head', 'language_model.lm_head')],
)  # fmt: skip

# A model of any family, computed by our own code, which adds experts.
BAM = Family(
  'BamForCausalLM', 'bam', _LAYERNORM, dict(norm_epsilon=1e-5, tied_embeddings=True),
  [Part(_read_own, _write_own), Part(_read_windows, _write_windows)],
  dict(hidden_act=[*_ACTIVATIONS.values()]),  # which `ffn` says
)  # fmt: skip
# In the order in which a model's own class is looked for.
FAMILIES = [
  Family(
    'CohereForCausalLM', 'cohere', _COHERE_KEYS, _COHERE,
    [_ROPE, _flag('use_qk_norm', 'qk_norm', 'head_layernorm')], _COHERE_ALLOWED,
  ),
  Family(
    'Cohere2ForCausalLM', 'cohere2', _COHERE_KEYS, _COHERE | dict(rope_theta=1e4),
    [_ROPE, Part(_read_cohere2_windows, _write_windows)], _COHERE_ALLOWED,
  ),
  Family('LlamaForCausalLM', 'llama', _RMSNORM, _LLAMA, [_ROPE, _BIASES, _MLP_BIAS]),
  Family(
    'MistralForCausalLM', 'mistral', _RMSNORM, _LLAMA | dict(num_kv_heads=8),
    [_ROPE, _all_windows(4096)],
  ),
  Family(
    'Qwen2ForCausalLM', 'qwen2', _RMSNORM, _LLAMA | dict(biases='qkv'), [_ROPE, _QWEN_WINDOWS],
    dict(hidden_act=['silu'], attention_bias=[False, True]),  # which transformers ignores
  ),
  Family(
    'Qwen3ForCausalLM', 'qwen3', _RMSNORM, _LLAMA | dict(head_dim=128, qk_norm='head_rms'),
    [_ROPE, _BIASES, _QWEN_WINDOWS],
  ),
  Family(
    'SmolLM3ForCausalLM', 'smollm3', _RMSNORM,
    _LLAMA | dict(tied_embeddings=True, num_kv_heads=4, rope_theta=2e6),
    [_ROPE, _BIASES, _QWEN_WINDOWS, Part(_read_nope_layers, _write_nope_layers)],
  ),
  Family('Olmo2ForCausalLM', 'olmo2', _RMSNORM, _OLMO, [_ROPE, _BIASES]),
  Family(
    'Olmo3ForCausalLM', 'olmo3', _RMSNORM, _OLMO,
    [
      _BIASES, Part(_read_olmo3_windows, _write_windows),
      Part(_read_nested_rope, _write_nested_rope),
    ],
  ),
  Family(
    'Phi3ForCausalLM', 'phi3', _RMSNORM, _LLAMA | dict(norm_epsilon=1e-5),
    [Part(_read_phi3_rope, _write_phi3_rope), _all_windows(None)], renamed=_PHI3_NAMES,
  ),
  Family(
    'GraniteForCausalLM', 'granite', _GRANITE_KEYS,
    _LLAMA | dict(embedding_scale=1.0, residual_scale=1.0, attention_scale=1.0),
    [_ROPE, _BIASES, _LOGITS_SCALING],
  ),
  Family(
    'GPTNeoXForCausalLM', 'gpt_neox', _NEOX_KEYS, _NEOX,
    [Part(_read_neox_rope, _write_neox_rope), Part(_read_neox_block, _write_neox_block)],
    dict(hidden_act=['gelu'], attention_bias=[True]), _NEOX_NAMES,
  ),
  Family(
    'Gemma2ForCausalLM', 'gemma2', _RMSNORM, _GEMMA, [*_gemma(50.0, 30.0, 2), _ROPE],
    _GEMMA_ALLOWED,
  ),
  _GEMMA3,
]  # fmt: skip
