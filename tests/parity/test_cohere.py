"""Imported from transformers' Cohere, the dense model has the same logits and the same gradients.

Random tiny models are written as files by transformers and read from there, so that names, layouts
and the keys of config.json are its own.
"""

import json

import jax
import numpy as np
import pytest
from flax import traverse_util

from bam_jax import config
from bam_jax.model import transformer
from bam_jax.train import loss
from bam_jax.upcycle import hf

# torch's build is several GB on some platforms; `make test-parity` installs it.
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
load_file = pytest.importorskip('safetensors.numpy').load_file

TOLERANCE = 1e-5  # of the largest magnitude in each array that is compared; both are float32
SIZES = dict(
  vocab_size=37,
  hidden_size=24,
  intermediate_size=20,
  num_hidden_layers=3,
  num_attention_heads=6,
  max_position_embeddings=64,
  pad_token_id=None,  # torch gives the row of a padding token no gradient
  bos_token_id=1,
  eos_token_id=2,
  logit_scale=0.4,
  layer_norm_eps=1e-2,  # and a theta and a scale that a tiny model feels
  rope_parameters={'rope_type': 'default', 'rope_theta': 30.0},
)
CASES = {
  'gqa': dict(num_key_value_heads=2),
  'gqa_qk_norm': dict(num_key_value_heads=2, use_qk_norm=True),
  'mha': dict(num_key_value_heads=6),
  'mha_qk_norm': dict(num_key_value_heads=6, use_qk_norm=True, logit_scale=1.0),
  'head_dim': dict(num_key_value_heads=3, head_dim=10, use_qk_norm=True, logit_scale=2.5),
  'untied': dict(num_key_value_heads=2, tie_word_embeddings=False),
}


def distance(got, want) -> float:
  """The largest difference, relative to the largest magnitude of what is wanted."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  return np.abs(got - want).max() / np.abs(want).max()


def random_model(case: str):
  """Their model, every parameter of which matters: no zeros, no ones, attention not uniform."""
  cohere = transformers.CohereForCausalLM(
    transformers.CohereConfig(**SIZES | CASES[case], attn_implementation='eager')
  )
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in cohere.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if 'norm' in name:
        parameter.copy_(1 + 0.3 * noise)
      elif 'embed' in name:
        parameter.copy_(noise)
      else:
        parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)
  return cohere.eval()


def make_batch() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  shape = 2, 12
  return {
    'tokens': rng.integers(0, 37, shape).astype(np.int32),
    'targets': rng.integers(0, 37, shape).astype(np.int32),
    'segments': np.ones(shape, np.int32),
    'positions': np.tile(np.arange(12, dtype=np.int32), (2, 1)),
    'weights': np.ones(shape, np.float32),
  }


def theirs(cohere, batch) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
  """Logits, the mean NLL, and its gradient by their names."""
  logits_BTV = cohere(torch.tensor(batch['tokens'], dtype=torch.long)).logits
  targets_N = torch.tensor(batch['targets'], dtype=torch.long).flatten()
  value = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_N)
  value.backward()
  slopes = {name: parameter.grad.numpy() for name, parameter in cohere.named_parameters()}
  return logits_BTV.detach().numpy(), value.item(), slopes


def ours(model: config.Model, params, batch) -> tuple[np.ndarray, float, dict]:
  network = transformer.Network(model, config.Compute())
  objective = loss.objective(network, config.Loss(load_balance=0, router_z=0))

  @jax.jit
  def run(params, batch):
    hidden_BTD, _ = network.hidden(params, batch['tokens'], batch['segments'], batch['positions'])
    (value, _), slopes = jax.value_and_grad(objective, has_aux=True)(params, batch)
    return network.logits(params, hidden_BTD), value, slopes

  return jax.device_get(run(params, batch))


@pytest.mark.parametrize('case', CASES)
def test_the_imported_model_is_theirs(case, tmp_path):
  cohere, batch = random_model(case), make_batch()
  cohere.save_pretrained(tmp_path)
  model = hf.model_from_hf(json.loads((tmp_path / 'config.json').read_text(encoding='utf-8')))
  params = hf.params_from_state_dict(load_file(tmp_path / 'model.safetensors'), model)

  logits_BTV, value, slopes = ours(model, params, batch)
  their_logits_BTV, their_value, their_slopes = theirs(cohere, batch)
  far = {'logits': distance(logits_BTV, their_logits_BTV), 'loss': distance(value, their_value)}
  wanted = traverse_util.flatten_dict(hf.params_from_state_dict(their_slopes, model), sep='/')
  got = traverse_util.flatten_dict(slopes, sep='/')
  assert got.keys() == wanted.keys()
  for path, array in wanted.items():
    assert np.abs(array).max() > 1e-4, f'{path} does not matter'
    far[path] = distance(got[path], array)
  print(case, max(far.items(), key=lambda item: item[1]))  # pytest -s shows how near
  assert {name: value for name, value in far.items() if not value < TOLERANCE} == {}


@pytest.mark.parametrize('case', CASES)
def test_the_exported_model_is_theirs_to_the_bit(case, tmp_path):
  cohere = random_model(case)
  cohere.save_pretrained(tmp_path)
  model = hf.model_from_hf(json.loads((tmp_path / 'config.json').read_text(encoding='utf-8')))
  stored = load_file(tmp_path / 'model.safetensors')
  params = hf.params_from_state_dict(stored, model)
  exported = hf.state_dict_from_params(params, model)
  assert {name: x.tobytes() for name, x in exported.items()} == {
    name: x.tobytes() for name, x in stored.items()
  }
  # In memory PyTorch lists a tied head under a name of its own.
  listed = {name: tensor.numpy() for name, tensor in cohere.state_dict().items()}
  assert ('lm_head.weight' in stored) == (not model.tied_embeddings)
  assert 'lm_head.weight' in listed
  again = hf.params_from_state_dict(listed, model)
  jax.tree.map(np.testing.assert_array_equal, again, params)
