"""Converts between a config.json of transformers and our model; unsupported keys are refused.

A dense model is of a family, or BamForCausalLM; mixtures of FFN experts alone have classes of their
own there, where the gates are ours.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

from bam_jax import config
from bam_jax.config.strict import require
from bam_jax.hf import families, names
from bam_jax.hf.families import BAM, FAMILIES, GEMMA3_IMAGES
from bam_jax.hf.parts import LENGTH, Facts

_SHARED = 128  # width of the expert for all tokens in Qwen2-MoE, which is zeros


class Mixture(NamedTuple):
  """A class of mixtures, with the blocks of a dense one."""

  architecture: str
  model_type: str
  base: families.Family
  renormalizes: bool  # always; else if norm_topk_prob says so
  # Parts of our tensors' names, and what they are there.
  renamed: tuple[tuple[str, str], ...] = (('.mlp.router', '.mlp.gate'),)


_BASES = {family.model_type: family for family in FAMILIES}
_MIXTRAL = (
  ('.mlp.router', '.block_sparse_moe.gate'), ('.mlp.', '.block_sparse_moe.'),
  ('gate_proj', 'w1'), ('up_proj', 'w3'), ('down_proj', 'w2'),
)  # fmt: skip
_GRANITE = (  # all experts in one tensor, gate and up too
  ('.mlp.router', '.block_sparse_moe.router.layer'), ('.mlp.experts.{1}.', '.block_sparse_moe.'),
  ('gate_proj', 'input_linear'), ('up_proj', 'input_linear'), ('down_proj', 'output_linear'),
)  # fmt: skip
# In the order in which a mixture's class is looked for.
MIXTURES = (
  Mixture('MixtralForCausalLM', 'mixtral', _BASES['mistral'], True, _MIXTRAL),
  Mixture('Qwen2MoeForCausalLM', 'qwen2_moe', _BASES['qwen2'], False),
  Mixture('Qwen3MoeForCausalLM', 'qwen3_moe', _BASES['qwen3'], False),
  Mixture('FlexOlmoForCausalLM', 'flex_olmo', _BASES['olmo2'], False),
  Mixture('GraniteMoeForCausalLM', 'granitemoe', _BASES['granite'], True, _GRANITE),
  Mixture('Cohere2MoeForCausalLM', 'cohere2_moe', _BASES['cohere2'], True),
)
_READ = *FAMILIES, GEMMA3_IMAGES, BAM


def of_text(config_json: Mapping[str, Any]) -> Mapping[str, Any]:
  """What a config.json says of a text model; Gemma 3 may have that beside one of images."""
  asked, text = config_json.get('architectures'), config_json.get('text_config')
  if asked != [GEMMA3_IMAGES.architecture] or not isinstance(text, dict):
    return config_json
  return {LENGTH: 131_072} | text | {'architectures': asked}


def to_model(config_json: Mapping[str, Any]) -> config.Model:
  """The model that a config.json describes.

  UserError names a key that describes a model unlike ours, is unknown and not turned off, or is
  missing and has no safe default.
  """
  asked = config_json.get('architectures')
  family = next((one for one in _READ if [one.architecture] == asked), None)
  mixed = any(config_json.get(key) for key in ('num_experts', 'num_local_experts'))
  name = str(asked).strip("[']")
  require(family or not mixed, f'{name} is a mixture: a seed must be dense.')
  known = ', '.join(one.architecture for one in _READ)
  require(family, f'architectures names {asked}: only {known} can be imported.')
  return families.read(family, config_json)


def tensors(model: config.Model, config_json: Mapping[str, Any]) -> tuple[names.Table, dict]:
  """The tensors of a folder by our paths, and the shapes, by name, of others, which are zeros."""
  asked = config_json['architectures']
  (chosen,) = (one for one in (*_READ, *MIXTURES) if [one.architecture] == asked)
  table = names.renamed(names.tensors(model), chosen.renamed)
  if chosen in MIXTURES:
    table.pop('blocks/ffn/expert_bias', None)
  return table, _zeros(model) if chosen.model_type == 'qwen2_moe' else {}


def to_origin(config_json: Mapping[str, Any]) -> tuple[int, str | None, tuple[str, ...]]:
  """The training length, how a mixture was made, and the sources of its experts."""
  method, sources = config_json.get('upcycling_method'), config_json.get('expert_sources') or ()
  methods = get_args(config.Method)
  require(method in (None, *methods), f'upcycling_method={method!r} is not one of {methods}.')
  return Facts(config_json).take(LENGTH, int), method, tuple(map(str, sources))


def from_model(
  model: config.Model,
  length: int,
  method: str | None,
  sources: Sequence[str],
  architecture: str | None = None,
  biased: bool = False,
) -> dict[str, Any]:
  """The config.json of a model; `to_model` and `to_origin` read it back.

  Its class is the first that computes it, or the one that is asked for; UserError if that one does
  not. BamForCausalLM computes every model. `biased` says that an `expert_bias` is not zero.
  """
  no_class = f'No class of transformers has embedding_rank={model.embedding_rank}'
  require(not model.embedding_rank, f'{no_class}: mix with embedding_rank=0 to export.')
  wrong = {one.architecture: _objection(one, model, length, biased) for one in MIXTURES}
  fitting = [one for one in FAMILIES if families.describes(one, model)]
  fitting += [one for one in MIXTURES if not wrong[one.architecture]]
  known = {one.architecture: one for one in (*fitting, BAM)}
  reason = wrong.get(architecture, f'This model is not {architecture}')
  require(architecture in (None, *known), f'{reason}: export as {" or ".join(known)}.')
  chosen = known[architecture or next(iter(known))]
  if chosen in MIXTURES:
    return _write_mixture(chosen, model, length) | {LENGTH: length}
  facts = families.write(chosen, model) | {LENGTH: length}
  own = {
    'auto_map': {
      'AutoConfig': 'configuration_bam.BamConfig',
      'AutoModel': 'modeling_bam.BamModel',
      'AutoModelForCausalLM': f'modeling_bam.{BAM.architecture}',
    },
    'upcycling_method': method,
    'expert_sources': list(sources),
  }
  return facts | own if chosen == BAM else facts


def _blocks(mixture: Mixture, model: config.Model, length: int) -> config.Model:
  """A mixture's blocks as a dense model that its class might have, computed alike."""
  dense, kind = model.dense(), mixture.model_type
  if kind == 'qwen2_moe' and dense.biases == 'none':
    return dataclasses.replace(dense, biases='qkv')  # zeros
  if kind == 'cohere2_moe' and not dense.layer_types and not dense.nope_layers:
    # Layers rotate if they slide, so all do, with a window as long as a text.
    return dataclasses.replace(dense, layer_types=('sliding',) * dense.num_layers, window=length)
  return dense


def _objection(mixture: Mixture, model: config.Model, length: int, biased: bool) -> str:
  """Why a class does not compute a model; '' if it does. `biased`: its expert_bias is not zero."""
  ffn, kind, name = model.ffn_experts, mixture.model_type, mixture.architecture
  fits = ffn and not model.attention_experts
  fits = fits and families.describes(mixture.base, _blocks(mixture, model, length))
  # vLLM computes Qwen2-MoE's head_dim; Qwen3-MoE has one kind of layer.
  computed = kind != 'qwen2_moe' or model.head_dim * model.num_heads == model.d_model
  if not fits or not computed or kind == 'qwen3_moe' and model.window:
    return f'This model is not {name}'
  if model.router_input != 'token':
    return f'Routers read the prefix, and those of {name} the token'
  if biased:
    return f'The expert_bias is not zero, and {name} has none'
  if mixture.renormalizes and not ffn.renormalize and ffn.top_k < ffn.num_experts:
    return f'FFN gates are not those of renormalize=True, and {name} divides them by their sum'
  return ''


def _write_mixture(mixture: Mixture, model: config.Model, length: int) -> dict[str, Any]:
  """The config.json of a mixture, but for tokens and dtype."""
  ffn, is_local = model.ffn_experts, mixture.model_type in ('mixtral', 'granitemoe')
  return families.write(mixture.base, _blocks(mixture, model, length)) | {
    'num_local_experts' if is_local else 'num_experts': ffn.num_experts,
    'num_experts_per_tok': ffn.top_k, 'norm_topk_prob': ffn.renormalize or mixture.renormalizes,
    'architectures': [mixture.architecture], 'model_type': mixture.model_type,
    'head_dim': model.head_dim, 'moe_intermediate_size': model.ffn_dim, 'mlp_only_layers': [],
    'shared_expert_intermediate_size': _SHARED, 'decoder_sparse_step': 1,
  }  # fmt: skip


def _zeros(model: config.Model) -> dict[str, tuple[int, ...]]:
  """The shapes of the tensors of Qwen2-MoE that we do not have, by name."""
  D, K, H, G = model.d_model, model.head_dim, model.num_heads, model.num_kv_heads
  shapes = {f'mlp.shared_expert.{one}_proj.weight': (_SHARED, D) for one in ('gate', 'up')}
  shapes |= {'mlp.shared_expert.down_proj.weight': (D, _SHARED)}
  shapes |= {'mlp.shared_expert_gate.weight': (1, D)}
  if model.biases == 'none':
    shapes |= {f'self_attn.{one}_proj.bias': (n * K,) for one, n in zip('qkv', (H, G, G))}
  layers = range(model.num_layers)
  return {f'model.layers.{n}.{name}': shape for n in layers for name, shape in shapes.items()}
