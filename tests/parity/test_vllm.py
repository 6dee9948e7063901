"""vLLM's engine, with our plugin, computes what BamForCausalLM does in transformers.

Without vLLM, the order in which the model file lays out weights is still compared with our arrays.
"""

import ast
import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from bam_jax.hf import exporting
from tests.hf import folders

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
safetensors_torch = pytest.importorskip('safetensors.torch')

FILE = Path(exporting.__file__).with_name('vllm_bam.py')
# Sizes that kernels for CPUs have, and that a tiny model feels.
SIZES = dict(d_model=64, num_heads=4, num_kv_heads=2, head_dim=32, ffn_dim=32)
FELT = dict(rope_theta=30.0, norm_epsilon=1e-2, logit_scale=0.4)
MIXTURES = [name for name in folders.MODELS if folders.make_model(name).attention_experts]
COMPUTED = [name for name in folders.MODELS if folders.make_model(name).ffn == 'swiglu']
installed = importlib.util.find_spec('vllm') is not None
needs_vllm = pytest.mark.skipif(not installed, reason='vLLM is not installed: docs/convert.md')


def export(folder: Path, name: str, **changes) -> tuple[Path, dict]:
  model = folders.make_model(name, **SIZES | FELT | changes)
  values = folders.draw(model)
  folders.write_checkpoint(folder / 'ours', model, values)
  options = dict(dtype=None, max_shard_size='50KB', progress=lambda done, total: None)
  to = str(folder / 'hf')
  exporting.convert(folder / 'ours', to, architecture='BamForCausalLM', **options)
  return folder / 'hf', values


@pytest.fixture
def model_file(monkeypatch):
  """The model file; without vLLM, with stand-ins for all that it imports from there."""
  if installed:
    return importlib.import_module('bam_jax.hf.vllm_bam')
  importlib.import_module('bam_jax.hf.modeling_bam')  # before vLLM seems to be there
  anything = lambda *values, **options: values[0] if values else None
  for node in ast.walk(ast.parse(FILE.read_text(encoding='utf-8'))):
    parts = (getattr(node, 'module', None) or '').split('.')
    for n in range(1, len(parts) + 1) if parts[0] == 'vllm' else ():
      module = types.ModuleType('.'.join(parts[:n]))
      module.__path__, module.__getattr__ = [], lambda name: anything
      monkeypatch.setitem(sys.modules, module.__name__, module)
  monkeypatch.delitem(sys.modules, 'bam_jax.hf.vllm_bam', raising=False)
  module = importlib.import_module('bam_jax.hf.vllm_bam')
  monkeypatch.delitem(sys.modules, 'bam_jax.hf.vllm_bam')
  return module


@pytest.mark.parametrize('name', MIXTURES)
def test_weights_of_all_attention_experts_in_the_order_of_heads(name, model_file, tmp_path):
  folder, values = export(tmp_path, name, **{'rotary_dim': 0})
  model, shared = folders.make_model(name), folders.make_model(name).attention_experts.shared_kv
  config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
  tensors = {}
  for file in sorted(folder.glob('*.safetensors')):
    tensors |= safetensors_torch.load_file(file)
  got = dict(model_file.merged(config, tensors.items()))
  assert not [key for key in got if 'self_attn.experts' in key]
  start = 'model.layers.1.self_attn.'
  at = lambda path: values[f'blocks/attention/{path}'][1]
  query, out = at('query'), at('out')  # EDHK, EHKD
  by_head = 'edgmk->gemkd' if shared else 'edgmk->egmkd'
  query = np.einsum(by_head, query.reshape(*query.shape[:2], 2, -1, 32))
  out = np.einsum('egmkd->dgemk' if shared else 'egmkd->degmk', out.reshape(-1, 2, 2, 32, 64))
  expected = {'q_proj.weight': query.reshape(-1, 64), 'o_proj.weight': out.reshape(64, -1)}
  key = at('key')[None] if shared else at('key')  # EDGK
  expected['k_proj.weight'] = key.transpose(0, 2, 3, 1).reshape(-1, 64)
  if model.qk_norm != 'none':
    scale = at('query_shared_scale')[:, None] if model.qk_norm == 'head_rms' else at('query_scale')
    scale = np.broadcast_to(scale, (len(scale), 4, 32)).reshape(-1, 2, 2, 32)
    expected['q_norm.weight'] = (scale.swapaxes(0, 1) if shared else scale).ravel()
  if model.biases == 'attention':
    expected['out_bias'] = at('out_bias')
  for key, value in expected.items():
    np.testing.assert_array_equal(got[start + key].numpy(), value, err_msg=key)


def serve(folder: Path, monkeypatch, **options):
  """Log-likelihoods (T, V) of prompts and of what vLLM made of them, and those of transformers."""
  from vllm import LLM, SamplingParams
  from vllm.distributed import cleanup_dist_env_and_memory

  monkeypatch.setenv('VLLM_ENABLE_V1_MULTIPROCESSING', '0')  # the engine is in this process
  monkeypatch.setenv('VLLM_CPU_KVCACHE_SPACE', '1')
  options = dict(enforce_eager=True, enable_prefix_caching=False) | options
  llm = LLM(str(folder), dtype='float32', max_model_len=64, max_logprobs=-1, **options)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 266, length).tolist() for length in (12, 7, 20)]
  asked = [{'prompt_token_ids': prompt} for prompt in prompts]
  every = dict(logprobs=-1, prompt_logprobs=-1, ignore_eos=True)
  done = llm.generate(asked, SamplingParams(temperature=0, max_tokens=9, **every), use_tqdm=False)
  del llm
  cleanup_dist_env_and_memory()
  load = transformers.AutoModelForCausalLM.from_pretrained
  model = load(folder, trust_remote_code=True, dtype=torch.float32).eval()
  for prompt, one in zip(prompts, done):
    rows = [*one.prompt_logprobs[1:], *one.outputs[0].logprobs]
    got = torch.tensor([[row[token].logprob for token in range(270)] for row in rows])
    with torch.no_grad():
      tokens = torch.tensor([[*prompt, *one.outputs[0].token_ids]])
      expected = model(tokens).logits[0, :-1].log_softmax(-1)
    yield got, expected, tokens[0, 1:], len(prompt) - 1


@needs_vllm
@pytest.mark.parametrize('name', COMPUTED)
def test_served_tokens_and_likelihoods(name, tmp_path, monkeypatch):
  folder, _ = export(tmp_path, name)
  for got, expected, tokens, start in serve(folder, monkeypatch):
    assert (got - expected).abs().max() < 1e-4
    assert torch.equal(expected[start:].argmax(-1), tokens[start:])


@needs_vllm
@pytest.mark.parametrize('name, kv_heads', [('kv_experts', 2), ('post_shared', 1)])
def test_two_devices_share_the_heads(name, kv_heads, tmp_path, monkeypatch):
  # With one key-value head for all, both have a copy of it.
  monkeypatch.setenv('VLLM_CPU_OMP_THREADS_BIND', '0|1')
  folder, _ = export(tmp_path, name, num_kv_heads=kv_heads)
  for got, expected, *_ in serve(folder, monkeypatch, tensor_parallel_size=2):
    assert (got - expected).abs().max() < 1e-4


def test_what_is_not_computed_is_refused(model_file):
  from bam_jax.hf.configuration_bam import BamConfig

  for name, value in dict(norm_place='both', biases='all', hidden_act='gelu').items():
    with pytest.raises(ValueError, match=f"^{name}='{value}' is not computed in vLLM, only .*:"):
      model_file.check(BamConfig(**{name: value}), quantized=False, devices=1)
  with pytest.raises(ValueError, match='not quantized'):
    model_file.check(BamConfig(), quantized=True, devices=1)
  sizes = dict(num_key_value_heads=1, num_attention_experts=3)
  with pytest.raises(ValueError, match='=2 does not fit the 3 key-value heads of all'):
    model_file.check(BamConfig(**sizes), quantized=False, devices=2)
  model_file.check(BamConfig(**sizes, shared_kv=True), quantized=False, devices=2)
