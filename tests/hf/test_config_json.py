"""A config.json is read as the model that it describes; what does not fit is refused by name.

That an imported model computes what transformers' does is shown in tests/parity.
"""

import json

import pytest

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.hf import config_json
from tests.hf.folders import COHERE, CONFIG, LLAMA, MODEL, MODELS, OLMO2, make_model

COHERE2 = {key: value for key, value in CONFIG.items() if key != 'use_qk_norm'} | {
  'architectures': ['Cohere2ForCausalLM'],
  'layer_types': ['sliding_attention', 'sliding_attention', 'full_attention'],
  'max_position_embeddings': 4096,
  'model_type': 'cohere2',
  'sliding_window': 4095,
}
SIZES = {
  'hidden_size': 24, 'intermediate_size': 20, 'max_position_embeddings': 512,
  'num_attention_heads': 6, 'num_hidden_layers': 5, 'vocab_size': 270,
}  # fmt: skip


def without(*keys: str, **changes) -> dict:
  return {key: value for key, value in CONFIG.items() if key not in keys} | changes


def replaced(**changes) -> config.Model:
  return config.Model(**(vars(MODEL) | changes))


THETA = replaced(rope_theta=5.0)


def test_a_config_of_the_family_which_is_left_as_it_was():
  before = {**CONFIG, 'rope_parameters': {'rope_theta': 8e6}}
  assert config_json.to_model(before) == MODEL
  assert before == {**CONFIG, 'rope_parameters': {'rope_theta': 8e6}}
  assert config_json.to_origin(CONFIG) == (8192, None, ())


@pytest.mark.parametrize(
  'changed, model',
  [
    (without('rope_theta', rope_parameters={'rope_theta': 5, 'rope_type': 'default'}), THETA),
    (without(rope_theta=5.0, rope_parameters={'rope_theta': 5.0}), THETA),
    (without('use_qk_norm'), replaced(qk_norm='none')),
    (without(tie_word_embeddings=False), replaced(tied_embeddings=False)),
    (without('num_key_value_heads'), replaced(num_kv_heads=6)),
    (without(head_dim=8), replaced(head_dim=8)),
    (without('attention_bias', 'tie_word_embeddings', 'hidden_act', 'rope_scaling'), MODEL),
    (without(use_parallel_block=True, use_gated_activation=True, rotary_pct=1.0), MODEL),
  ],
)
def test_what_may_be_absent_or_elsewhere(changed, model):
  assert config_json.to_model(changed) == model


def test_cohere2_turns_in_its_sliding_layers_alone():
  windows = dict(layer_types=('sliding', 'sliding', 'full'), window=4095, nope_layers=(2,))
  model = replaced(qk_norm='none', **windows)
  assert config_json.to_model(COHERE2) == model
  # Older files have a pattern; its default, every fourth, leaves three layers that slide.
  older = {key: value for key, value in COHERE2.items() if key != 'layer_types'}
  assert config_json.to_model(older | {'sliding_window_pattern': 3}) == model
  assert config_json.to_model(older).nope_layers == ()
  with pytest.raises(UserError, match='use_qk_norm=True'):
    config_json.to_model(COHERE2 | {'use_qk_norm': True})


# What a file that says nothing more means: transformers' defaults, measured.
ABSENT = {
  'LlamaForCausalLM': dict(norm_epsilon=1e-6, rope_theta=1e4, tied_embeddings=False),
  'MistralForCausalLM': dict(window=4096, layer_types=('sliding',) * 5),
  'Qwen2ForCausalLM': dict(biases='qkv', layer_types=(), norm_epsilon=1e-6),
  'Qwen3ForCausalLM': dict(head_dim=128, qk_norm='head_rms'),
  'SmolLM3ForCausalLM': dict(tied_embeddings=True, rope_theta=2e6, nope_layers=(3,)),
  'Olmo2ForCausalLM': dict(norm_place='post', qk_norm='all_rms', norm_epsilon=1e-5),
  'Olmo3ForCausalLM': dict(
    window=4096, layer_types=(*['sliding'] * 3, 'full', 'sliding'), rope_theta=5e5
  ),
  'Phi3ForCausalLM': dict(rotary_dim=0, norm_epsilon=1e-5, layer_types=()),
  'GraniteForCausalLM': dict(attention_scale=1.0, logit_scale=1.0, embedding_scale=1.0),
}


@pytest.mark.parametrize('architecture', ABSENT)
def test_what_an_absent_key_means(architecture):
  heads = {'num_key_value_heads': 2}
  model = config_json.to_model(SIZES | heads | {'architectures': [architecture]})
  assert model.block == 'sequential' and model.norm == 'rmsnorm' and model.rotary_layout == 'half'
  got = {field: getattr(model, field) for field in ABSENT[architecture]}
  assert got == ABSENT[architecture]
  written = config_json.from_model(model, 64, None, (), architecture)
  assert config_json.to_model(json.loads(json.dumps(written))) == model


def test_a_class_that_computes_another_model_is_refused():
  model = replaced(block='sequential', norm='rmsnorm', rotary_layout='half', qk_norm='none')
  model = config.Model(**vars(model) | {'logit_scale': 1.0})
  assert config_json.from_model(model, 64, None, ())['architectures'] == ['LlamaForCausalLM']
  with pytest.raises(
    UserError, match='is not Qwen2ForCausalLM: export as LlamaForCausalLM or Mistral'
  ):
    config_json.from_model(model, 64, None, (), 'Qwen2ForCausalLM')


@pytest.mark.parametrize(
  'blocks, architecture, named',
  [
    (
      LLAMA,
      'Mixtral',
      'FFN gates are not those of renormalize=True, and MixtralForCausalLM divides them by their '
      'sum: export as Qwen2MoeForCausalLM or BamForCausalLM.',
    ),
    (LLAMA, 'Qwen3Moe', 'not Qwen3MoeForCausalLM: export as Qwen2MoeForCausalLM or Bam'),
    (LLAMA | {'head_dim': 10}, 'Qwen2Moe', 'not Qwen2MoeForCausalLM: export as BamForCausalLM'),
    (LLAMA | {'attention_scale': 0.3}, 'Qwen2Moe', 'not Qwen2MoeForCausalLM: export as BamFor'),
    (COHERE, 'Cohere2Moe', 'by their sum: export as BamForCausalLM'),
    (OLMO2, 'Llama', 'not LlamaForCausalLM: export as FlexOlmoForCausalLM or Bam'),
  ],
)
def test_a_class_of_mixtures_with_other_gates_or_blocks_is_refused(blocks, architecture, named):
  model = make_model(**blocks, ffn_experts=config.FFNExperts(3, top_k=2))
  with pytest.raises(UserError, match=named):
    config_json.from_model(model, 64, None, (), f'{architecture}ForCausalLM')
  written = config_json.from_model(model, 64, None, (), 'BamForCausalLM')
  assert config_json.to_model(json.loads(json.dumps(written))) == model
  with pytest.raises(UserError, match='MixtralForCausalLM is a mixture: a seed must be dense'):
    config_json.to_model(written | {'architectures': ['MixtralForCausalLM']})


@pytest.mark.parametrize('name', MODELS)
def test_every_model_comes_back(name):
  model = make_model(name)
  written = config_json.from_model(model, 64, 'btx', ('seed', 'code'))
  written = json.loads(json.dumps(written))
  assert config_json.to_model(written) == model
  has_origin = written['architectures'] == ['BamForCausalLM']
  origin = ('btx', ('seed', 'code')) if has_origin else (None, ())
  assert config_json.to_origin(written) == (64, *origin)


@pytest.mark.parametrize(
  'changes, named',
  [
    ({'num_experts_per_tok': 9}, 'top_k=9'),
    ({'num_shared_experts': 1}, 'num_shared_experts=1'),
    ({'block': 'serial'}, "block='serial' is not one of"),
    ({'attention_expert_ropes': [5]}, 'rope_parameters=5'),
    ({'norm_topk_prob': ...}, 'norm_topk_prob is missing'),
    ({'upcycling_method': 'magic'}, "upcycling_method='magic'"),
  ],
)
def test_a_mixture_that_does_not_fit_is_named(changes, named):
  written = config_json.from_model(make_model('kv_experts'), 64, None, ()) | changes
  written = {key: value for key, value in written.items() if value is not ...}
  with pytest.raises(UserError, match=named):
    config_json.to_model(written)
    config_json.to_origin(written)
