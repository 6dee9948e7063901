"""A config.json is read as the model that it describes; what does not fit is refused by name.

That an imported model computes what transformers' does is shown in tests/parity.
"""

import json

import pytest

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.hf import config_json
from tests.hf.folders import CONFIG, MODEL, MODELS, make_model

COHERE2 = {key: value for key, value in CONFIG.items() if key != 'use_qk_norm'} | {
  'architectures': ['Cohere2ForCausalLM'],
  'layer_types': ['sliding_attention'] * 3,
  'max_position_embeddings': 4096,
  'model_type': 'cohere2',
  'sliding_window': 4096,
}


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
    (without('tie_word_embeddings'), MODEL),
    (without(tie_word_embeddings=False), replaced(tied_embeddings=False)),
    (without('num_key_value_heads'), replaced(num_kv_heads=6)),
    (without(head_dim=8), replaced(head_dim=8)),
    (without('attention_bias', 'attention_dropout', 'hidden_act', 'rope_scaling'), MODEL),
    (without(use_parallel_block=True, use_gated_activation=True, rotary_pct=1.0), MODEL),
  ],
)
def test_what_may_be_absent_or_elsewhere(changed, model):
  assert config_json.to_model(changed) == model


@pytest.mark.parametrize(
  'changed, named',
  [
    (without(architectures=['LlamaForCausalLM']), 'LlamaForCausalLM'),
    (without('architectures'), 'architectures names None'),
    (without(attention_bias=True), 'attention_bias=True'),
    (without(rotary_pct=0.5), 'rotary_pct=0.5'),
    (without(rope_scaling={'type': 'linear', 'factor': 2.0}), 'rope_scaling'),
    (without(num_experts=4), 'num_experts=4'),
    (without(quantization_config={'bits': 4}), 'quantization_config'),
    (without('rope_theta'), 'rope_theta is missing'),
    (without(rope_parameters={'rope_theta': 5.0}), 'but rope_parameters.rope_theta=5.0'),
    (without(rope_parameters={'rope_theta': 8e6, 'rope_type': 'yarn'}), 'yarn'),
    (without(logit_scale=float('nan')), 'logit_scale=nan'),
    (without(hidden_size=26), 'hidden_size=26'),
    (without(num_key_value_heads=4), 'num_kv_heads=4'),
  ],
  ids=lambda value: value if isinstance(value, str) else '',
)
def test_what_does_not_fit_is_named(changed, named):
  with pytest.raises(UserError, match=named):
    config_json.to_model(changed)


def test_cohere2_whose_layers_are_ours():
  assert config_json.to_model(COHERE2) == replaced(qk_norm='none')
  # Older files have a pattern: here the fourth layer, which is not there, would see without RoPE.
  older = {key: value for key, value in COHERE2.items() if key != 'layer_types'}
  assert config_json.to_model(older) == replaced(qk_norm='none')
  assert config_json.to_model({**older, 'sliding_window_pattern': 5}) == replaced(qk_norm='none')


@pytest.mark.parametrize(
  'changes, named',
  [
    (
      {'layer_types': ['sliding_attention'] * 2 + ['full_attention']},
      'layer 2 does not use RoPE',
    ),
    ({'sliding_window': 4095}, 'sliding_window=4095 is below max_position_embeddings=4096'),
    ({'use_qk_norm': True}, 'use_qk_norm=True'),
  ],
)
def test_cohere2_whose_layers_are_not_ours(changes, named):
  with pytest.raises(UserError, match=named):
    config_json.to_model(COHERE2 | changes)


@pytest.mark.parametrize('name', MODELS)
def test_every_model_comes_back(name):
  model = make_model(name)
  written = config_json.from_model(model, 64, 'btx', ('seed', 'code'))
  written = json.loads(json.dumps(written))
  assert config_json.to_model(written) == model
  origin = (None, ()) if model == model.dense() else ('btx', ('seed', 'code'))
  assert config_json.to_origin(written) == (64, *origin)


@pytest.mark.parametrize(
  'changes, named',
  [
    ({'num_experts_per_tok': 9}, 'top_k=9'),
    ({'num_shared_experts': 1}, 'num_shared_experts=1'),
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
