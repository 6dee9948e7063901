"""Classes of transformers for mixtures of FFN experts alone, where their gates are ours.

Zeros fill what such a class has beyond our model: Qwen2-MoE's shared expert and its biases.
"""

import dataclasses
from typing import Any, NamedTuple

from bam_jax import config
from bam_jax.hf import families, names

_SHARED = 128  # width of Qwen2-MoE's shared expert


class Mixture(NamedTuple):
  """A class with the blocks of a dense one."""

  architecture: str
  model_type: str
  base: families.Family
  renormalizes: bool  # always; else as norm_topk_prob says
  renamed: tuple[tuple[str, str], ...]  # parts of our tensors' names, and what they are there


_BASES = {family.model_type: family for family in families.FAMILIES}
_GATE = (('.mlp.router', '.mlp.gate'),)
_MIXTRAL = (
  ('.mlp.router', '.block_sparse_moe.gate'), ('.mlp.', '.block_sparse_moe.'),
  ('gate_proj', 'w1'), ('up_proj', 'w3'), ('down_proj', 'w2'),
)  # fmt: skip
_GRANITE = (  # one tensor for all experts, of gate and up
  ('.mlp.router', '.block_sparse_moe.router.layer'),
  ('.mlp.experts.{1}.gate_proj', '.block_sparse_moe.input_linear'),
  ('.mlp.experts.{1}.up_proj', '.block_sparse_moe.input_linear'),
  ('.mlp.experts.{1}.down_proj', '.block_sparse_moe.output_linear'),
)
# In the order in which a mixture's class is looked for.
MIXTURES = (
  Mixture('MixtralForCausalLM', 'mixtral', _BASES['mistral'], True, _MIXTRAL),
  Mixture('Qwen2MoeForCausalLM', 'qwen2_moe', _BASES['qwen2'], False, _GATE),
  Mixture('Qwen3MoeForCausalLM', 'qwen3_moe', _BASES['qwen3'], False, _GATE),
  Mixture('FlexOlmoForCausalLM', 'flex_olmo', _BASES['olmo2'], False, _GATE),
  Mixture('GraniteMoeForCausalLM', 'granitemoe', _BASES['granite'], True, _GRANITE),
  Mixture('Cohere2MoeForCausalLM', 'cohere2_moe', _BASES['cohere2'], True, _GATE),
)


def _blocks(mixture: Mixture, model: config.Model, length: int) -> config.Model:
  """The dense model whose config.json describes the blocks, if the class has them."""
  dense = model.dense()
  if mixture.model_type == 'qwen2_moe' and dense.biases == 'none':
    return dataclasses.replace(dense, biases='qkv')  # which are zeros
  if mixture.model_type == 'cohere2_moe' and not dense.layer_types and not dense.nope_layers:
    # Layers rotate if they slide, so all do, with a window as long as a text.
    return dataclasses.replace(dense, layer_types=('sliding',) * dense.num_layers, window=length)
  return dense


def objection(mixture: Mixture, model: config.Model, length: int, biased: bool) -> str:
  """Why a class does not compute a model; '' if it does. `biased`: expert_bias is not zero."""
  ffn, blocks, name = model.ffn_experts, _blocks(mixture, model, length), mixture.architecture
  fits = ffn and not model.attention_experts and families.describes(mixture.base, blocks)
  if mixture.model_type == 'qwen2_moe':  # which vLLM has without a head_dim
    fits = fits and model.head_dim * model.num_heads == model.d_model
  if mixture.model_type == 'qwen3_moe':
    fits = fits and not model.window
  if not fits:
    return f'This model is not {name}'
  if biased:
    return f'The expert_bias is not zero, and {name} has none'
  if mixture.renormalizes and not ffn.renormalize and ffn.top_k < ffn.num_experts:
    return (
      f'FFN gates are not renormalised (renormalize=True), and {name} divides them by their sum'
    )
  return ''


def write(mixture: Mixture, model: config.Model, length: int) -> dict[str, Any]:
  """The config.json of a mixture, but for tokens and dtype."""
  ffn = model.ffn_experts
  facts = families.write(mixture.base, _blocks(mixture, model, length))
  facts |= {'architectures': [mixture.architecture], 'model_type': mixture.model_type}
  local = mixture.model_type in ('mixtral', 'granitemoe')
  facts |= {
    'num_local_experts' if local else 'num_experts': ffn.num_experts,
    'num_experts_per_tok': ffn.top_k,
    'norm_topk_prob': ffn.renormalize or mixture.renormalizes,
    'head_dim': model.head_dim,
  }
  if mixture.model_type in ('qwen2_moe', 'qwen3_moe'):
    facts |= {'moe_intermediate_size': model.ffn_dim, 'mlp_only_layers': []}
    facts |= {'decoder_sparse_step': 1, 'shared_expert_intermediate_size': _SHARED}
  return facts


def tensors(mixture: Mixture, model: config.Model) -> names.Table:
  """The tensors of a mixture by our paths; see `zeros` for others."""
  table = names.tensors(model)
  table.pop('blocks/ffn/expert_bias', None)
  for path, tensor in table.items():
    name = tensor.name
    for ours, theirs in mixture.renamed:
      name = name.replace(ours, theirs)
    table[path] = tensor._replace(name=name)
  return table


def zeros(mixture: Mixture, model: config.Model) -> dict[str, tuple[int, ...]]:
  """The shapes of tensors without values of ours, by their names."""
  if mixture.model_type != 'qwen2_moe':
    return {}
  D, K, H, G = model.d_model, model.head_dim, model.num_heads, model.num_kv_heads
  shapes = {f'mlp.shared_expert.{one}_proj.weight': (_SHARED, D) for one in ('gate', 'up')}
  shapes |= {'mlp.shared_expert.down_proj.weight': (D, _SHARED)}
  shapes |= {'mlp.shared_expert_gate.weight': (1, D)}
  if model.biases == 'none':
    heads = {'q': H, 'k': G, 'v': G}
    shapes |= {f'self_attn.{one}_proj.bias': (count * K,) for one, count in heads.items()}
  layers = range(model.num_layers)
  return {f'model.layers.{n}.{name}': shape for n in layers for name, shape in shapes.items()}
