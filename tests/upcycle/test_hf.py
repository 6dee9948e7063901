"""Cohere's names and shapes: round trips are exact, and whatever does not fit is refused by name.

That the imported model computes what Cohere's does is shown in tests/parity, with transformers.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.model import transformer
from bam_jax.upcycle import hf

CONFIG = {
  'architectures': ['CohereForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'bos_token_id': 5,
  'eos_token_id': 255001,
  'hidden_act': 'silu',
  'hidden_size': 24,
  'initializer_range': 0.02,
  'intermediate_size': 20,
  'layer_norm_eps': 1e-05,
  'logit_scale': 0.0625,
  'max_position_embeddings': 8192,
  'model_max_length': 131072,
  'model_type': 'cohere',
  'num_attention_heads': 6,
  'num_hidden_layers': 3,
  'num_key_value_heads': 2,
  'pad_token_id': 0,
  'pretraining_tp': 1,
  'rope_scaling': None,
  'rope_theta': 8000000.0,
  'tie_word_embeddings': True,
  'torch_dtype': 'float16',
  'transformers_version': '4.38.2',
  'use_cache': True,
  'use_qk_norm': True,
  'vocab_size': 30,
}
MODEL = config.Model(
  vocab_size=30,
  d_model=24,
  num_layers=3,
  num_heads=6,
  num_kv_heads=2,
  head_dim=4,
  ffn_dim=20,
  rope_theta=8e6,
  norm_epsilon=1e-5,
  qk_norm=True,
  logit_scale=0.0625,
)


def without(*keys: str, **changes) -> dict:
  return {key: value for key, value in CONFIG.items() if key not in keys} | changes


def replaced(**changes) -> config.Model:
  return config.Model(**(vars(MODEL) | changes))


def random_params(model: config.Model) -> dict:
  rng = np.random.default_rng(0)
  abstract = transformer.Network(model, config.Compute()).abstract()
  flat = traverse_util.flatten_dict(abstract, sep='/')
  arrays = {path: rng.normal(size=x.shape).astype(np.float32) for path, x in flat.items()}
  return traverse_util.unflatten_dict(arrays, sep='/')


def flat(params: dict) -> dict[str, np.ndarray]:
  return traverse_util.flatten_dict(params, sep='/')


# The configuration.


def test_a_config_of_the_family():
  assert hf.model_from_hf(CONFIG) == MODEL


@pytest.mark.parametrize(
  'changed, model',
  [
    (without('rope_theta', rope_parameters={'rope_theta': 5.0, 'rope_type': 'default'}), 5.0),
    (without('rope_theta', rope_parameters={'rope_theta': 5}), 5.0),
    (without(rope_theta=5.0, rope_parameters={'rope_theta': 5.0}), 5.0),
    (without(rope_theta=5.0, rope_parameters=None), 5.0),
  ],
)
def test_rope_theta_stands_in_two_places(changed, model):
  assert hf.model_from_hf(changed) == replaced(rope_theta=model)


@pytest.mark.parametrize(
  'changed, model',
  [
    (without('use_qk_norm'), replaced(qk_norm=False)),
    (without('tie_word_embeddings'), MODEL),
    (without(tie_word_embeddings=False), replaced(tied_embeddings=False)),
    (without('num_key_value_heads'), replaced(num_kv_heads=6)),
    (without(num_key_value_heads=None), replaced(num_kv_heads=6)),
    (without(head_dim=8), replaced(head_dim=8)),
    (without(head_dim=None), MODEL),
    (without('attention_bias', 'attention_dropout', 'hidden_act', 'rope_scaling'), MODEL),
    (without(sliding_window=None, use_parallel_embedding=False), MODEL),
  ],
)
def test_what_may_be_absent(changed, model):
  assert hf.model_from_hf(changed) == model


@pytest.mark.parametrize(
  'changed, named',
  [
    (without(architectures=['LlamaForCausalLM']), 'LlamaForCausalLM'),
    (without(architectures=['Cohere2ForCausalLM']), 'Cohere2ForCausalLM'),
    (without('architectures'), 'architectures'),
    (without(attention_bias=True), 'attention_bias=True'),
    (without(attention_dropout=0.1), 'attention_dropout=0.1'),
    (without(hidden_act='gelu'), 'hidden_act'),
    (without(rope_scaling={'type': 'linear', 'factor': 2.0}), 'rope_scaling'),
    (without(sliding_window=4096), 'sliding_window=4096'),
    (without(use_parallel_attention=True), 'use_parallel_attention'),
    (without(quantization_config={'bits': 4}), 'quantization_config'),
    (without('rope_theta'), 'rope_theta is missing'),
    (without(rope_parameters={'rope_theta': 5.0}), 'which is it'),
    (without(rope_parameters={'rope_theta': 8e6, 'rope_type': 'yarn'}), 'yarn'),
    (without(rope_parameters={'rope_theta': 8e6, 'factor': 2.0}), 'rope_parameters.factor'),
    (without('logit_scale'), 'logit_scale is missing'),
    (without(logit_scale=None), 'logit_scale=None'),
    (without(logit_scale=float('nan')), 'logit_scale=nan'),
    (without('layer_norm_eps'), 'layer_norm_eps is missing'),
    (without('hidden_size'), 'hidden_size is missing'),
    (without(hidden_size='24'), "hidden_size='24'"),
    (without(num_hidden_layers=True), 'num_hidden_layers=True'),
    (without(hidden_size=26), 'hidden_size=26'),
    (without(num_key_value_heads=4), 'num_kv_heads=4'),
    (without(tie_word_embeddings='yes'), 'tie_word_embeddings'),
  ],
  ids=lambda value: value if isinstance(value, str) else '',
)
def test_what_does_not_fit_is_named(changed, named):
  with pytest.raises(UserError, match=named):
    hf.model_from_hf(changed)


def test_the_config_is_left_as_it_was():
  before = {**CONFIG, 'rope_parameters': {'rope_theta': 8e6}}
  hf.model_from_hf(before)
  assert before == {**CONFIG, 'rope_parameters': {'rope_theta': 8e6}}


# The arrays.

MODELS = [MODEL, replaced(qk_norm=False, num_kv_heads=6), replaced(tied_embeddings=False)]


@pytest.mark.parametrize('model', MODELS)
def test_every_parameter_has_a_name(model):
  assert hf.names(model).keys() == flat(random_params(model)).keys()
  assert len(set(hf.names(model).values())) == len(hf.names(model))


@pytest.mark.parametrize('model', MODELS)
def test_there_and_back_is_bitwise(model):
  params = random_params(model)
  arrays = hf.state_dict_from_params(params, model)
  for name, array in arrays.items():
    assert array.flags.c_contiguous and array.dtype == np.float32, name
  back = flat(hf.params_from_state_dict(arrays, model))
  assert back.keys() == flat(params).keys()
  for path, array in flat(params).items():
    assert back[path].tobytes() == array.tobytes(), path
  again = hf.state_dict_from_params(hf.params_from_state_dict(arrays, model), model)
  assert {name: x.tobytes() for name, x in again.items()} == {
    name: x.tobytes() for name, x in arrays.items()
  }


def test_where_single_elements_go():
  params = random_params(MODEL)
  arrays, attention = hf.state_dict_from_params(params, MODEL), params['blocks']['attention']
  layer = 'model.layers.2.'
  # (out, in), where heads follow one another: head 5, channel 3 is row 5 * 4 + 3.
  assert arrays[layer + 'self_attn.q_proj.weight'][23, 7] == attention['query'][2, 7, 5, 3]
  assert arrays[layer + 'self_attn.k_proj.weight'][6, 7] == attention['key'][2, 7, 1, 2]
  assert arrays[layer + 'self_attn.o_proj.weight'][7, 23] == attention['out'][2, 5, 3, 7]
  assert arrays[layer + 'self_attn.k_norm.weight'][1, 3] == attention['key_scale'][2, 1, 3]
  assert arrays[layer + 'mlp.down_proj.weight'][7, 11] == params['blocks']['ffn']['down'][2, 11, 7]
  assert arrays['model.embed_tokens.weight'][9, 7] == params['embed']['table'][9, 7]


def test_square_matrices_are_transposed_too():
  model = replaced(ffn_dim=24, vocab_size=24, tied_embeddings=False)
  params = random_params(model)
  arrays = hf.state_dict_from_params(params, model)
  name = 'model.layers.0.mlp.up_proj.weight'
  np.testing.assert_array_equal(arrays[name].T, params['blocks']['ffn']['up'][0])
  np.testing.assert_array_equal(arrays['lm_head.weight'].T, params['unembed']['kernel'])
  np.testing.assert_array_equal(arrays['model.embed_tokens.weight'], params['embed']['table'])


def test_narrow_floats_are_widened_exactly():
  arrays = hf.state_dict_from_params(random_params(MODEL), MODEL)
  for dtype in (jnp.bfloat16, np.float16):
    narrow = {name: array.astype(dtype) for name, array in arrays.items()}
    params = hf.params_from_state_dict(narrow, MODEL)
    assert all(array.dtype == np.float32 for array in flat(params).values())
    for name, array in hf.state_dict_from_params(params, MODEL).items():
      np.testing.assert_array_equal(array.astype(dtype), narrow[name])


def test_a_tied_head_may_be_listed_beside_the_table():
  arrays = hf.state_dict_from_params(random_params(MODEL), MODEL)
  table = arrays['model.embed_tokens.weight']
  hf.params_from_state_dict({**arrays, 'lm_head.weight': table.copy()}, MODEL)
  with pytest.raises(UserError, match='lm_head.weight is not model.embed_tokens.weight'):
    hf.params_from_state_dict({**arrays, 'lm_head.weight': table + 1}, MODEL)


def test_tensors_that_do_not_fit_are_named():
  arrays = hf.state_dict_from_params(random_params(MODEL), MODEL)
  q_proj = 'model.layers.1.self_attn.q_proj.weight'
  for changed, named in [
    ({name: x for name, x in arrays.items() if name != q_proj}, f'{q_proj} is missing'),
    ({**arrays, 'model.layers.3.mlp.up_proj.weight': np.zeros(1)}, 'model.layers.3.mlp.up_proj'),
    ({**arrays, q_proj.replace('weight', 'bias'): np.zeros(24)}, 'q_proj.bias'),
    ({**arrays, q_proj: arrays[q_proj][:-1]}, rf'{q_proj} has shape \(23, 24\)'),
    ({**arrays, q_proj: arrays[q_proj].astype(np.float64)}, f'{q_proj} has dtype float64'),
    ({**arrays, q_proj: arrays[q_proj].astype(np.int8)}, f'{q_proj} has dtype int8'),
  ]:
    with pytest.raises(UserError, match=named):
      hf.params_from_state_dict(changed, MODEL)


def test_parameters_that_do_not_fit_are_named():
  params = random_params(MODEL)
  mixture = replaced(ffn_experts=config.FFNExperts(2))
  with pytest.raises(UserError, match='has experts'):
    hf.state_dict_from_params(params, mixture)
  with pytest.raises(UserError, match='blocks/attention/key_scale.*no such'):
    hf.state_dict_from_params(params, replaced(qk_norm=False))
  with pytest.raises(UserError, match='unembed/kernel is missing'):
    hf.state_dict_from_params(params, replaced(tied_embeddings=False))
  with pytest.raises(UserError, match=r'has shape \(3,'):
    hf.state_dict_from_params(params, replaced(num_layers=2))
