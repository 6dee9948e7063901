"""Every array of every model has its names over there, and every element its place."""

import jax.numpy as jnp
import numpy as np
import pytest

from bam_jax import config
from bam_jax.hf import names
from tests.hf.folders import MODELS, draw, make_model


def exported(model: config.Model, values: dict) -> dict[str, np.ndarray]:
  table = names.tensors(model)
  return {
    name: names.to_theirs(table[path], values[path][index], values[path].dtype)
    for name, [(path, index, *_)] in names.pieces(table).items()
  }


@pytest.mark.parametrize('name', MODELS)
def test_every_array_has_names_of_its_own_and_comes_back_to_the_bit(name):
  model = make_model(name)
  values, table = draw(model), names.tensors(model)
  for dtype in (np.float32, jnp.bfloat16):
    for [(path, index, *_)] in names.pieces(table).values():
      tensor, array = table[path], values[path][index].astype(dtype)
      theirs = names.to_theirs(tensor, array, array.dtype)
      assert theirs.flags.c_contiguous and theirs.shape == tensor.theirs
      back = names.to_ours(tensor, theirs, array.dtype)
      assert back.flags.c_contiguous and back.tobytes() == array.tobytes(), path


def test_where_single_elements_of_a_mixture_go():
  model = make_model('routed')
  ours = draw(model)
  theirs, layer = exported(model, ours), 'model.layers.1.'
  attention, heads = 'blocks/attention/', layer + 'self_attn.experts.2.'
  assert theirs[heads + 'q_proj.weight'][23, 7] == ours[attention + 'query'][1, 2, 7, 5, 3]
  assert theirs[heads + 'k_norm.weight'][1, 3] == ours[attention + 'key_scale'][1, 2, 1, 3]
  assert theirs[layer + 'mlp.experts.3.up_proj.weight'][11, 7] == ours['blocks/ffn/up'][1, 3, 7, 11]
  assert theirs[layer + 'mlp.router.weight'][3, 7] == ours['blocks/ffn/router'][1, 7, 3]
  assert theirs[layer + 'self_attn.router.weight'][2, 7] == ours[attention + 'router'][1, 7, 2]
  bias = layer + 'mlp.router.e_score_correction_bias'
  assert theirs[bias][3] == ours['blocks/ffn/expert_bias'][1, 3]
  shared = make_model('shared_kv')
  ours = draw(shared)
  theirs = exported(shared, ours)
  assert theirs[layer + 'self_attn.v_proj.weight'][6, 7] == ours[attention + 'value'][1, 7, 1, 2]
  assert theirs['lm_head.weight'][9, 7] == ours['unembed/kernel'][7, 9]
