"""Classes of transformers for mixtures of FFN experts alone, where their gates are ours."""

import dataclasses
from typing import Any, NamedTuple

from bam_jax import config
from bam_jax.hf import families, names

_SHARED = 128  # width of the expert for all tokens in Qwen2-MoE, which is zeros


class Mixture(NamedTuple):
  """A class with the blocks of a dense one."""

  architecture: str
  model_type: str
  base: families.Family
  renormalizes: bool  # always; else if norm_topk_prob says so
  renamed: tuple[tuple[str, str], ...]  # parts of our tensors' names, and what they are there


_BASES = {family.model_type: family for family in families.FAMILIES}
_GATE = (('.mlp.router', '.mlp.gate'),)
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
  Mixture('Qwen2MoeForCausalLM', 'qwen2_moe', _BASES['qwen2'], False, _GATE),
  Mixture('Qwen3MoeForCausalLM', 'qwen3_moe', _BASES['qwen3'], False, _GATE),
  Mixture('FlexOlmoForCausalLM', 'flex_olmo', _BASES['olmo2'], False, _GATE),
  Mixture('GraniteMoeForCausalLM', 'granitemoe', _BASES['granite'], True, _GRANITE),
  Mixture('Cohere2MoeForCausalLM', 'cohere2_moe', _BASES['cohere2'], True, _GATE),
)


def _blocks(mixture: Mixture, model: config.Model, length: int) -> config.Model:
  """A mixture's blocks as a dense model that its class might have, computed alike."""
  dense, kind = model.dense(), mixture.model_type
  if kind == 'qwen2_moe' and dense.biases == 'none':
    return dataclasses.replace(dense, biases='qkv')  # zeros
  if kind == 'cohere2_moe' and not dense.layer_types and not dense.nope_layers:
    # Layers rotate if they slide, so all do, with a window as long as a text.
    return dataclasses.replace(dense, layer_types=('sliding',) * dense.num_layers, window=length)
  return dense


def objection(mixture: Mixture, model: config.Model, length: int, biased: bool) -> str:
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


def write(mixture: Mixture, model: config.Model, length: int) -> dict[str, Any]:
  """The config.json of a mixture, but for tokens and dtype."""
  ffn, is_local = model.ffn_experts, mixture.model_type in ('mixtral', 'granitemoe')
  return families.write(mixture.base, _blocks(mixture, model, length)) | {
    'num_local_experts' if is_local else 'num_experts': ffn.num_experts,
    'num_experts_per_tok': ffn.top_k, 'norm_topk_prob': ffn.renormalize or mixture.renormalizes,
    'architectures': [mixture.architecture], 'model_type': mixture.model_type,
    'head_dim': model.head_dim, 'moe_intermediate_size': model.ffn_dim, 'mlp_only_layers': [],
    'shared_expert_intermediate_size': _SHARED, 'decoder_sparse_step': 1,
  }  # fmt: skip


def tensors(mixture: Mixture, model: config.Model) -> tuple[names.Table, dict[str, tuple]]:
  """The tensors of a mixture by our paths, and the shapes, by name, of others, which are zeros."""
  table = names.renamed(names.tensors(model), mixture.renamed)
  table.pop('blocks/ffn/expert_bias', None)
  if mixture.model_type != 'qwen2_moe':
    return table, {}
  D, K, H, G = model.d_model, model.head_dim, model.num_heads, model.num_kv_heads
  shapes = {f'mlp.shared_expert.{one}_proj.weight': (_SHARED, D) for one in ('gate', 'up')}
  shapes |= {'mlp.shared_expert.down_proj.weight': (D, _SHARED)}
  shapes |= {'mlp.shared_expert_gate.weight': (1, D)}
  if model.biases == 'none':
    shapes |= {f'self_attn.{one}_proj.bias': (n * K,) for one, n in zip('qkv', (H, G, G))}
  numbers = range(model.num_layers)
  return table, {f'model.layers.{n}.{name}': x for n in numbers for name, x in shapes.items()}
