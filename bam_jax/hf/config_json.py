"""A config.json of transformers and our model: one is read as the other, or refused by name."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from bam_jax import config
from bam_jax.config import strict
from bam_jax.errors import UserError

COHERE, COHERE2, BAM = 'CohereForCausalLM', 'Cohere2ForCausalLM', 'BamForCausalLM'
ARCHITECTURES = (COHERE, COHERE2, BAM)

# Keys that change nothing about the parameters and what is computed from them.
_IRRELEVANT = frozenset(
  """
  _name_or_path architectures auto_map bos_token_id dtype eos_token_id expert_sources
  initializer_range max_position_embeddings model_max_length model_type pad_token_id pretraining_tp
  torch_dtype transformers_version unk_token_id upcycling_method use_cache
  """.split()
)
# Keys that may stand there with this value and no other; absent, they have it.
_FIXED = {
  'attention_bias': False,
  'attention_dropout': 0.0,
  'hidden_act': 'silu',
  'position_embedding_type': 'rope_gptj',
  'rope_scaling': None,
  'rotary_pct': 1.0,
  'use_embedding_sharing': True,
  'use_gated_activation': True,
  'use_parallel_block': True,
}
_SIZES = {
  'vocab_size': 'vocab_size',
  'd_model': 'hidden_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'ffn_dim': 'intermediate_size',
}
# BAM's own keys: a section of our model, and what its options are called.
_ATTENTION_EXPERTS = {
  'num_experts': 'num_attention_experts',
  'top_k': 'num_attention_experts_per_tok',
  'shared_kv': 'shared_kv',
  'renormalize': 'norm_topk_attention',
}
_FFN_EXPERTS = {
  'num_experts': 'num_experts',
  'top_k': 'num_experts_per_tok',
  'renormalize': 'norm_topk_prob',
  'capacity_factor': 'expert_buffer_factor',
  'expert_bias': 'use_expert_bias',
}


def to_model(config_json: Mapping[str, Any]) -> config.Model:
  """The model that a config.json describes.

  Raises:
    UserError: it names the key that describes another model than ours, or that is not known here
      and is not simply off; what is missing and has no safe default is named too.
  """
  facts = dict(config_json)
  architectures = facts.pop('architectures', None)
  if not isinstance(architectures, list) or len(architectures) != 1:
    architectures = [architectures]
  (architecture,) = architectures
  if architecture not in ARCHITECTURES:
    raise UserError(
      f'architectures names {architecture!r}: only {", ".join(ARCHITECTURES)} can be imported.'
    )
  if architecture == COHERE2:
    _check_cohere2(facts)
  for key, only in _FIXED.items():
    value = facts.pop(key, only)
    if value != only:
      raise UserError(f'{key}={value!r} is not {only!r}: our model has nothing like it.')

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
  if architecture == BAM:
    model['attention_experts'] = _experts(facts, config.AttentionExperts, _ATTENTION_EXPERTS)
    model['ffn_experts'] = _experts(facts, config.FFNExperts, _FFN_EXPERTS)
  for key, value in facts.items():
    # Whatever is off or empty cannot make it another model: sliding windows, parallel variants.
    if key not in _IRRELEVANT and value not in (None, False):
      raise UserError(
        f'{key}={value!r} is a key that we cannot follow: the import might be another model.'
      )
  return config.Model(**model)


def to_length(config_json: Mapping[str, Any]) -> int:
  """The tokens that the model of a config.json was trained on at once."""
  return _whole(dict(config_json), 'max_position_embeddings')


def to_origin(config_json: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
  """How a mixture was made, and the names of its experts' sources; nothing where it is not said."""
  method, sources = config_json.get('upcycling_method'), config_json.get('expert_sources') or ()
  if method not in (None, *get_args(config.Method)):
    raise UserError(f'upcycling_method={method!r} is not one of {get_args(config.Method)}.')
  return method, tuple(map(str, sources))


def from_model(
  model: config.Model, length: int, method: str | None, sources: Sequence[str]
) -> dict[str, Any]:
  """The config.json of a model, all of whose keys are read back.

  Args:
    model: any variant; a dense one is Cohere's.
    length: tokens that it was trained on at once.
    method: how a mixture was made.
    sources: names of what its experts were.
  """
  facts = {
    **{theirs: getattr(model, ours) for ours, theirs in _SIZES.items()},
    'num_key_value_heads': model.num_kv_heads,
    'head_dim': model.head_dim,
    'max_position_embeddings': length,
    'layer_norm_eps': model.norm_epsilon,
    'rope_theta': model.rope_theta,
    'logit_scale': model.logit_scale,
    'use_qk_norm': model.qk_norm,
    'tie_word_embeddings': model.tied_embeddings,
  }
  if model == model.dense():
    return facts | {
      'architectures': [COHERE],
      'model_type': 'cohere',
      'attention_bias': False,
      'attention_dropout': 0.0,
      'hidden_act': 'silu',
      # Where releases of transformers from 5 on look for it.
      'rope_parameters': {'rope_type': 'default', 'rope_theta': model.rope_theta},
    }
  return facts | {
    'architectures': [BAM],
    'model_type': 'bam',
    'auto_map': {
      'AutoConfig': 'configuration_bam.BamConfig',
      'AutoModel': 'modeling_bam.BamModel',
      'AutoModelForCausalLM': f'modeling_bam.{BAM}',
    },
    **_from_experts(model.attention_experts, _ATTENTION_EXPERTS),
    **_from_experts(model.ffn_experts, _FFN_EXPERTS),
    'upcycling_method': method,
    'expert_sources': list(sources),
  }


def _check_cohere2(facts: dict[str, Any]) -> None:
  """UserError unless every layer rotates positions and sees everything, as ours do."""
  pattern = facts.pop('sliding_window_pattern', 4)
  layers, window = facts.pop('layer_types', None), facts.pop('sliding_window', None)
  count = _whole(dict(facts), 'num_hidden_layers')
  if layers is None:  # older files give a pattern, or rely on the default
    layers = ['sliding_attention' if n % pattern else 'full_attention' for n in range(1, count + 1)]
  if len(layers) != count:
    raise UserError(f'layer_types has {len(layers)} layers and num_hidden_layers={count}.')
  for number, kind in enumerate(layers):
    if kind != 'sliding_attention' or window is None:
      raise UserError(
        f'layer {number} has {kind} (layer_types, sliding_window={window}), to which Cohere2 gives '
        'no rotary positions: all of our layers have them.'
      )
  length = to_length(facts)
  if type(window) is not int or window < length:
    raise UserError(
      f'sliding_window={window} is below max_position_embeddings={length}: our layers see '
      'everything.'
    )
  if _flag(facts, 'use_qk_norm', False):
    raise UserError('use_qk_norm=True is not False: Cohere2 has no norm of queries and keys.')


def _experts(facts: dict[str, Any], section: type, names: Mapping[str, str]) -> Any:
  """A section of our model, or None where there are no experts."""
  anything = lambda value: True  # what each of them may be is for the section to say
  if not _pop(dict(facts), names['num_experts'], anything, ''):
    for theirs in names.values():
      facts.pop(theirs, None)
    return None
  options = {ours: _pop(facts, theirs, anything, '') for ours, theirs in names.items()}
  return strict.from_dict(section, options, 'config.json')


def _from_experts(section: Any, names: Mapping[str, str]) -> dict[str, Any]:
  if section is None:
    return {names['num_experts']: 0}
  return {theirs: getattr(section, ours) for ours, theirs in names.items()}


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
