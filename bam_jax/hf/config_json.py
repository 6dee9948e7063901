"""Converts between a config.json of transformers and our model; unsupported keys are refused."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from bam_jax import config
from bam_jax.config import strict
from bam_jax.config.strict import require

COHERE, COHERE2, BAM = 'CohereForCausalLM', 'Cohere2ForCausalLM', 'BamForCausalLM'
ARCHITECTURES = (COHERE, COHERE2, BAM)
# Keys without effect on the parameters or the computation.
_IRRELEVANT = frozenset(
  """
  _name_or_path architectures auto_map bos_token_id dtype eos_token_id expert_sources
  initializer_range max_position_embeddings model_max_length model_type pad_token_id pretraining_tp
  torch_dtype transformers_version unk_token_id upcycling_method use_cache
  """.split()
)
# Keys that may only have this value, which is also their default.
_FIXED = {
  'attention_bias': False, 'attention_dropout': 0.0, 'hidden_act': 'silu',
  'position_embedding_type': 'rope_gptj', 'rope_scaling': None, 'rotary_pct': 1.0,
  'use_embedding_sharing': True, 'use_gated_activation': True, 'use_parallel_block': True,
}  # fmt: skip
# Fields of our model, their keys there, and their types.
_FIELDS = {
  'vocab_size': ('vocab_size', int),
  'd_model': ('hidden_size', int),
  'num_layers': ('num_hidden_layers', int),
  'num_heads': ('num_attention_heads', int),
  'num_kv_heads': ('num_key_value_heads', int),
  'head_dim': ('head_dim', int),
  'ffn_dim': ('intermediate_size', int),
  'norm_epsilon': ('layer_norm_eps', float),
  'logit_scale': ('logit_scale', float),
  'tied_embeddings': ('tie_word_embeddings', bool),
  'qk_norm': ('use_qk_norm', bool),
}
# The same of the experts' options, which BamForCausalLM has.
_ATTENTION_EXPERTS = {
  'num_experts': 'num_attention_experts', 'top_k': 'num_attention_experts_per_tok',
  'shared_kv': 'shared_kv', 'renormalize': 'norm_topk_attention',
}  # fmt: skip
_FFN_EXPERTS = {
  'num_experts': 'num_experts', 'top_k': 'num_experts_per_tok', 'renormalize': 'norm_topk_prob',
  'capacity_factor': 'capacity_factor', 'expert_bias': 'use_expert_bias',
}  # fmt: skip
_LENGTH = 'max_position_embeddings'
_KINDS = {int: 'a positive whole number', float: 'a positive number', bool: 'true or false'}


def to_model(config_json: Mapping[str, Any]) -> config.Model:
  """The model that a config.json describes.

  UserError names a key that describes a model unlike ours, is unknown and not turned off, or is
  missing and has no safe default.
  """
  facts = dict(config_json)
  found = facts.pop('architectures', None)
  known = isinstance(found, list) and len(found) == 1 and found[0] in ARCHITECTURES
  only = ', '.join(ARCHITECTURES)
  require(known, f'architectures names {found!r}: only {only} can be imported.')
  architecture = found[0]
  if architecture == COHERE2:
    _check_cohere2(facts)
  for key, only in _FIXED.items():
    value = facts.pop(key, only)
    require(value == only, f'{key}={value!r} is not {only!r}: our model does not support it.')
  width, heads = (_take(dict(facts), key, int) for key in ('hidden_size', 'num_attention_heads'))
  wrong = f'hidden_size={width} is not a multiple of num_attention_heads={heads}'
  given = not width % heads or facts.get('head_dim') is not None
  require(given, f'{wrong}: head_dim is required.')
  # transformers omits keys with default values from the file.
  defaults = dict(num_kv_heads=heads, head_dim=width // heads, tied_embeddings=True, qk_norm=False)
  model = {
    field: _take(facts, key, kind, defaults.get(field)) for field, (key, kind) in _FIELDS.items()
  }
  model['rope_theta'] = _rope_theta(facts)
  if architecture == BAM:
    model['attention_experts'] = _experts(facts, config.AttentionExperts, _ATTENTION_EXPERTS)
    model['ffn_experts'] = _experts(facts, config.FFNExperts, _FFN_EXPERTS)
  for key, value in facts.items():
    # Keys that are off or empty are harmless: sliding windows, parallel variants.
    harmless = key in _IRRELEVANT or value in (None, False)
    require(harmless, f'{key}={value!r} is an unsupported key: the imported model might differ.')
  return config.Model(**model)


def to_origin(config_json: Mapping[str, Any]) -> tuple[int, str | None, tuple[str, ...]]:
  """The training length, how a mixture was made, and the sources of its experts."""
  method, sources = config_json.get('upcycling_method'), config_json.get('expert_sources') or ()
  methods = get_args(config.Method)
  known = method is None or method in methods
  require(known, f'upcycling_method={method!r} is not one of {methods}.')
  return _take(dict(config_json), _LENGTH, int), method, tuple(map(str, sources))


def from_model(
  model: config.Model, length: int, method: str | None, sources: Sequence[str]
) -> dict[str, Any]:
  """The config.json of a model; `to_model` and `to_origin` read it back."""
  facts = {
    **{key: getattr(model, field) for field, (key, _) in _FIELDS.items()},
    _LENGTH: length,
    'attention_bias': False,
    'attention_dropout': 0.0,
    'hidden_act': 'silu',
    'rope_theta': model.rope_theta,
    # Where transformers 5 expects it.
    'rope_parameters': {'rope_type': 'default', 'rope_theta': model.rope_theta},
  }
  if model == model.dense():
    return facts | {'architectures': [COHERE], 'model_type': 'cohere'}
  attention, ffn = model.attention_experts, model.ffn_experts
  for experts, keys in ((attention, _ATTENTION_EXPERTS), (ffn, _FFN_EXPERTS)):
    facts[keys['num_experts']] = 0
    if experts:
      facts |= {theirs: getattr(experts, ours) for ours, theirs in keys.items()}
  return facts | {
    'architectures': [BAM],
    'model_type': 'bam',
    'auto_map': {
      'AutoConfig': 'configuration_bam.BamConfig',
      'AutoModel': 'modeling_bam.BamModel',
      'AutoModelForCausalLM': f'modeling_bam.{BAM}',
    },
    'upcycling_method': method,
    'expert_sources': list(sources),
  }


def _experts(facts: dict[str, Any], section: type, keys: Mapping[str, str]) -> Any:
  """A section of our model, or None without experts."""
  options = {ours: facts.pop(theirs) for ours, theirs in keys.items() if theirs in facts}
  if options.get('num_experts') == 0:
    return None
  for ours, theirs in keys.items():
    require(ours in options, f'{theirs} is missing.')
  return strict.from_dict(section, options, 'config.json')


def _check_cohere2(facts: dict[str, Any]) -> None:
  """UserError unless every layer uses RoPE and full causal attention, as ours do."""
  count, length = (_take(dict(facts), k, int) for k in ('num_hidden_layers', _LENGTH))
  pattern = _take(facts, 'sliding_window_pattern', int, 4)
  layers, window = facts.pop('layer_types', None), _take(facts, 'sliding_window', int)
  others = [pattern - 1] if pattern <= count else []
  if layers is not None:  # older files give the pattern, or rely on the default
    listed = isinstance(layers, list) and len(layers) == count
    require(listed, f'layer_types={layers!r} does not list num_hidden_layers={count} layers.')
    others = [number for number, kind in enumerate(layers) if kind != 'sliding_attention']
  wrong = f'layer {min(others, default=0)} does not use RoPE, as all of ours do: see layer_types.'
  require(not others, wrong)
  wrong = f'sliding_window={window} is below {_LENGTH}={length}: our layers attend to all.'
  require(window >= length, wrong)
  wrong = 'use_qk_norm=True is not False: Cohere2 has no norm of queries and keys.'
  require(not facts.get('use_qk_norm'), wrong)


def _rope_theta(facts: dict[str, Any]) -> float:
  """The base of RoPE: at the top level in older files, under rope_parameters in newer ones."""
  newer = facts.pop('rope_parameters', None) or {}
  require(isinstance(newer, Mapping), f'rope_parameters={newer!r} is not an object.')
  for key, value in newer.items():
    known = key == 'rope_theta' or value is None or (key, value) == ('rope_type', 'default')
    require(known, f'rope_parameters.{key}={value!r} is not supported.')
  groups = [group for group in (facts, dict(newer)) if group.get('rope_theta') is not None]
  found = [_take(group, 'rope_theta', float) for group in groups]
  # The default of transformers changed from one release to the next.
  require(found, 'rope_theta is missing, at the top level and under rope_parameters.')
  differ = f'rope_theta={found[0]}, but rope_parameters.rope_theta={found[-1]}.'
  require(found[0] == found[-1], differ)
  return found[0]


def _take(facts: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
  """Removes and returns a value of a type; if it is absent or null, the default, if any."""
  if facts.get(key) is None and default is not None:
    facts.pop(key, None)
    return default
  require(key in facts, f'{key} is missing.')
  value = facts.pop(key)
  fits = type(value) is kind or (kind is float and type(value) is int)
  fits = fits and (kind is bool or 0 < value <= sys.float_info.max)
  require(fits, f'{key}={value!r} is not {_KINDS[kind]}.')
  return kind(value)
