"""The dense families of transformers: how each one's config.json says what our model's fields say.

A family reads a config.json into fields of `config.Model`, and writes those of a model that it can
describe. Keys that a file omits have the values that transformers 5.24 gives them.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bam_jax import config
from bam_jax.config import strict
from bam_jax.config.strict import require
from bam_jax.errors import UserError
from bam_jax.hf import parts
from bam_jax.hf.parts import NEEDED, Facts, Part

# Keys without effect on the parameters or the computation.
_IRRELEVANT = frozenset(
  """
  _name_or_path architectures attention_dropout auto_map bos_token_id classifier_dropout dtype
  embd_pdrop eos_token_id expert_sources hidden_dropout initializer_range max_position_embeddings
  model_max_length model_type pad_token_id pretraining_tp resid_pdrop rope_scaling_type torch_dtype
  transformers_version unk_token_id upcycling_method use_cache
  """.split()
)
_ACTIVATIONS = {'swiglu': 'silu', 'geglu_tanh': 'gelu_pytorch_tanh', 'gelu': 'gelu'}
_TYPES = typing.get_type_hints(config.Model)


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
    fields[field] = facts.take(key, _TYPES[field], fields.get(field, NEEDED))
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
  """The config.json of a model, but for tokens and dtype; `read` gives the model back."""
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


def _flag(key: str, field: str, *values: str, default: bool = False) -> Part:
  """A key that is true if a field has one of these values; read, it is the first."""

  def read_flag(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
    return {field: values[0]} if facts.take(key, bool, default) else {}

  return Part(read_flag, lambda model: {key: getattr(model, field) in values})


def _read_mlp_bias(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  biased = fields.get('biases') == 'attention' and facts.take('mlp_bias', bool, False)
  return {'biases': 'all'} if biased else {}


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
    return parts.read_pattern(facts, fields, pattern)

  return [Part(read_scales, write_scales), Part(read_windows, parts.WINDOWS.write), _BIASES]


_BIASES = _flag('attention_bias', 'biases', 'attention', 'all')
_MLP_BIAS = Part(_read_mlp_bias, lambda model: {'mlp_bias': model.biases == 'all'})
_NEOX_BLOCK = _flag('use_parallel_residual', 'block', 'parallel_two_norms', default=True)
_LOGITS_SCALING = Part(
  lambda facts, fields: dict(logit_scale=1 / facts.take('logits_scaling', float, 1.0)),
  lambda model: {'logits_scaling': 1 / model.logit_scale},
)


# Fields under our own names where transformers has none.
_OWN = (
  'block', 'norm', 'norm_place', 'qk_norm', 'biases', 'rotary_layout', 'rotary_dim', 'nope_layers',
  'window_rope_theta', 'attention_scale', 'embedding_scale', 'residual_scale', 'logit_scale', 'ffn',
  'attention_cap', 'logit_cap', 'router_input', 'router_memory',
)  # fmt: skip
# Keys of the experts' options.
_EXPERTS = {
  'attention_experts': {
    'num_experts': 'num_attention_experts', 'top_k': 'num_attention_experts_per_tok',
    'shared_kv': 'shared_kv', 'renormalize': 'norm_topk_attention',
  },
  'ffn_experts': {
    'num_experts': 'num_experts', 'top_k': 'num_experts_per_tok', 'renormalize': 'norm_topk_prob',
    'capacity_factor': 'capacity_factor', 'expert_bias': 'use_expert_bias',
  },
}  # fmt: skip
_ROPES = 'attention_expert_ropes'


def _read_own(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  own = {name: facts.pop(name) for name in _OWN if facts.get(name) is not None}
  for experts, keys in _EXPERTS.items():
    options = {ours: facts.pop(theirs) for ours, theirs in keys.items() if theirs in facts}
    if options.get('num_experts') != 0:
      missing = [theirs for ours, theirs in keys.items() if ours not in options]
      require(not missing, f'{", ".join(missing)} is missing.')
      own[experts] = options
  groups = [Facts(rope_parameters=group) for group in facts.take(_ROPES, list, ())]
  ropes = tuple(config.Rope(*parts.read_rope(group, None).values()) for group in groups)
  fields = vars(strict.from_dict(config.Model, fields | own, 'config.json'))
  if attention := fields['attention_experts']:
    fields = fields | {'attention_experts': dataclasses.replace(attention, ropes=ropes)}
  return fields | parts.read_rope(facts, None)


def _write_own(model: config.Model) -> dict[str, Any]:
  facts = {name: getattr(model, name) for name in _OWN}
  for experts, keys in _EXPERTS.items():
    options = getattr(model, experts)
    facts[keys['num_experts']] = 0
    facts |= {theirs: getattr(options, ours) for ours, theirs in keys.items() if options}
  rope_of = lambda theta, scaling: parts.write_rope(theta, scaling)['rope_parameters']
  ropes = model.attention_experts.ropes if model.attention_experts else ()
  facts[_ROPES] = [rope_of(one.theta, one.scaling) for one in ropes]
  return facts | {'rope_parameters': rope_of(model.rope_theta, model.rope_scaling)}


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
  block='sequential', norm='layernorm_bias', rotary_layout='half', biases='all', ffn='gelu',
  tied_embeddings=False, norm_epsilon=1e-5,
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
  [*_gemma(None, None, 6), parts.GEMMA3_ROPES], _GEMMA_ALLOWED,
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
  [Part(_read_own, _write_own), parts.WINDOWS],
  dict(hidden_act=[*_ACTIVATIONS.values()]),  # which `ffn` says
)  # fmt: skip
# In the order in which a model's own class is looked for.
FAMILIES = [
  Family(
    'CohereForCausalLM', 'cohere', _COHERE_KEYS, _COHERE,
    [parts.ROPE, _flag('use_qk_norm', 'qk_norm', 'head_layernorm')], _COHERE_ALLOWED,
  ),
  Family(
    'Cohere2ForCausalLM', 'cohere2', _COHERE_KEYS, _COHERE | dict(rope_theta=1e4),
    [parts.ROPE, parts.COHERE2_WINDOWS], _COHERE_ALLOWED,
  ),
  Family('LlamaForCausalLM', 'llama', _RMSNORM, _LLAMA, [parts.ROPE, _BIASES, _MLP_BIAS]),
  Family(
    'MistralForCausalLM', 'mistral', _RMSNORM, _LLAMA | dict(num_kv_heads=8),
    [parts.ROPE, parts.all_or_none(4096)],
  ),
  Family(
    'Qwen2ForCausalLM', 'qwen2', _RMSNORM, _LLAMA | dict(biases='qkv'),
    [parts.ROPE, parts.QWEN_WINDOWS],
    dict(hidden_act=['silu'], attention_bias=[False, True]),  # which transformers ignores
  ),
  Family(
    'Qwen3ForCausalLM', 'qwen3', _RMSNORM, _LLAMA | dict(head_dim=128, qk_norm='head_rms'),
    [parts.ROPE, _BIASES, parts.QWEN_WINDOWS],
  ),
  Family(
    'SmolLM3ForCausalLM', 'smollm3', _RMSNORM,
    _LLAMA | dict(tied_embeddings=True, num_kv_heads=4, rope_theta=2e6),
    [parts.ROPE, _BIASES, parts.QWEN_WINDOWS, parts.NOPE_LAYERS],
  ),
  Family('Olmo2ForCausalLM', 'olmo2', _RMSNORM, _OLMO, [parts.ROPE, _BIASES]),
  Family(
    'Olmo3ForCausalLM', 'olmo3', _RMSNORM, _OLMO, [_BIASES, parts.PATTERN, parts.NESTED_ROPES]
  ),
  Family(
    'Phi3ForCausalLM', 'phi3', _RMSNORM, _LLAMA | dict(norm_epsilon=1e-5),
    [parts.PARTIAL_ROPE, parts.all_or_none(None)], renamed=_PHI3_NAMES,
  ),
  Family(
    'GraniteForCausalLM', 'granite', _GRANITE_KEYS,
    _LLAMA | dict(embedding_scale=1.0, residual_scale=1.0, attention_scale=1.0),
    [parts.ROPE, _BIASES, _LOGITS_SCALING],
  ),
  Family(
    'GPTNeoXForCausalLM', 'gpt_neox', _NEOX_KEYS, _NEOX,
    [parts.NEOX_ROPE, _NEOX_BLOCK], dict(hidden_act=['gelu'], attention_bias=[True]), _NEOX_NAMES,
  ),
  Family(
    'Gemma2ForCausalLM', 'gemma2', _RMSNORM, _GEMMA, [*_gemma(50.0, 30.0, 2), parts.ROPE],
    _GEMMA_ALLOWED,
  ),
  _GEMMA3,
]  # fmt: skip
