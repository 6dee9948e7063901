"""What a folder may hold that cannot be imported, each with its sentence; nothing is written then.

docs/convert.md lists what can be.
"""

import pickle
from pathlib import Path

import numpy as np
import pytest

from bam_jax.hf import importing
from tests.hf import folders
from tests.hf.folders import CONFIG, cohere_tensors
from tests.hf.test_importing import Q_PROJ, check_refused, convert

LLAMA = {
  'architectures': ['LlamaForCausalLM'], 'hidden_size': 24, 'intermediate_size': 20,
  'max_position_embeddings': 512, 'num_attention_heads': 6, 'num_hidden_layers': 5,
  'vocab_size': 270,
}  # fmt: skip
PHI3, QWEN3, QWEN3_MOE = (
  {'architectures': [f'{name}ForCausalLM']} for name in ('Phi3', 'Qwen3', 'Qwen3Moe')
)
SLIDING = {'layer_types': ['sliding_attention'] * 5, 'sliding_window': None}
SCALED = {'rope_type': 'linear', 'factor': 2.0}
CONFIGS = [
  # Another model, or one that is not dense.
  (CONFIG, {'architectures': ['BloomForCausalLM']}, 'BloomForCausalLM.*LlamaForCausalLM, '),
  (CONFIG, {'architectures': ...}, 'architectures names None: only Cohere.* can be imported'),
  (LLAMA, QWEN3_MOE | {'num_experts': 8}, 'Qwen3MoeForCausalLM is a mixture: a seed must be dense'),
  (LLAMA, {'num_local_experts': 4}, 'num_local_experts=4'),
  # Keys that are missing, or unlike what others in the file say.
  (CONFIG, {'rope_theta': ...}, 'rope_theta, at the top level and under .*, is missing'),
  (LLAMA, {'num_attention_heads': 7}, 'head_dim is required'),
  (CONFIG, {'hidden_size': 26}, 'hidden_size=26 is not a multiple'),
  (CONFIG, {'num_key_value_heads': 4}, 'num_heads=6 is not a multiple of num_kv_heads=4'),
  (CONFIG, {'logit_scale': float('nan')}, 'logit_scale=nan is not a positive number'),
  (CONFIG, {'max_position_embeddings': 0}, 'max_position_embeddings=0 is not a positive whole'),
  (CONFIG, {'num_hidden_layers': 4}, 'lacks model.layers.3'),
  (LLAMA, QWEN3 | {'layer_types': ['full_attention']}, 'does not list num_hidden_layers=5 layers'),
  (LLAMA, QWEN3 | SLIDING, 'sliding_window is null, but layer_types has sliding_attention'),
  (LLAMA, SLIDING, 'layer_types=.* is not supported'),
  (LLAMA, PHI3 | {'head_dim': 6, 'partial_rotary_factor': 0.5}, 'rotary_dim=3 is odd'),
  (LLAMA, PHI3 | {'partial_rotary_factor': 2.0}, 'rotary_dim=8 .* above head_dim=4'),
  # Rotations.
  (CONFIG, {'rope_parameters': {'rope_theta': 5.0}}, 'rope_theta, .*, is given twice'),
  (CONFIG, {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "'dynamic' changes with a text"),
  (LLAMA, {'rope_parameters': {'rope_type': 'longrope'}}, "'longrope' changes with a text's"),
  (LLAMA, {'rope_scaling': {'type': 'mrope', 'mrope_section': [1]}}, "rope_type='mrope'"),
  (LLAMA, {'use_mrope': True}, 'use_mrope=True is not supported'),
  (LLAMA, {'rope_scaling': SCALED, 'rope_parameters': SCALED | {'factor': 3.0}}, 'differ: remove'),
  (CONFIG, {'rope_scaling': SCALED | {'beta': 1}}, "beta of rope_type='linear' is an unsupported"),
  (LLAMA, {'rope_parameters': {'rope_type': 'yarn'}}, 'factor is missing'),
  # Keys that change the computation, and those that nobody knows.
  (CONFIG, {'attention_bias': True}, 'attention_bias=True is not supported'),
  (CONFIG, {'rotary_pct': 0.5}, 'rotary_pct=0.5 is not supported'),
  (LLAMA, {'mlp_bias': True}, 'mlp_bias=True'),
  (LLAMA, {'hidden_act': 'gelu'}, "hidden_act='gelu' is not supported"),
  (LLAMA, {'clip_qkv': 8.0}, 'clip_qkv=8.0 is not supported'),
  (LLAMA, {'use_bidirectional_attention': True}, 'use_bidirectional_attention=True'),
  (LLAMA, {'quantization_config': {'bits': 4}}, 'quantization_config=.* is not supported'),
  (CONFIG, {'an_unknown_key': 'on'}, "an_unknown_key='on' is not supported"),
]
TABLE, HEAD = 'model.embed_tokens.weight', 'lm_head.weight'
ZEROS = lambda *shape: np.zeros(shape, np.float32)
TENSORS = [
  ({Q_PROJ: ...}, f'lacks {Q_PROJ}, which'),
  ({Q_PROJ: ZEROS(23, 24)}, rf'{Q_PROJ} of shape \(23, 24\)'),
  ({Q_PROJ.replace('weight', 'bias'): ZEROS(24)}, 'has .*q_proj.bias of shape .*no such tensor'),
  ({Q_PROJ.replace('self_attn.q', 'mlp.experts.1.up'): ZEROS(20, 24)}, 'has .*mlp.experts.1.up_'),
  ({HEAD: ZEROS(3, 24)}, 'lm_head.weight of shape'),
  (
    {HEAD: ZEROS(270, 24)},
    'lm_head.weight is not the table, although tie_word_embeddings is true, and transformers 5 '
    'would serve it: set that to false, or delete the tensor',
  ),
  (
    {'model.layers.0.self_attn.rotary_emb.inv_freq': np.array([1, 0.5], 'f')},
    'inv_freq that differs from the frequencies of its config.json',
  ),
  ({'model.norm.weight': np.full(24, -np.inf, 'f')}, r'-inf at model.norm.weight\[0\]'),
]
QUANTISED = np.ones((24, 24), np.int8)


def changed(before: dict, changes: dict) -> dict:
  return {key: value for key, value in (before | changes).items() if value is not ...}


@pytest.mark.parametrize(
  'base, changes, named', CONFIGS, ids=[','.join(changes) for _, changes, _ in CONFIGS]
)
def test_what_a_config_may_not_say(tmp_path, base, changes, named):
  source_ = folders.write_hf(tmp_path / 'hf', changed(base, changes), cohere_tensors())
  check_refused(source_, named)


@pytest.mark.parametrize('changes, named', TENSORS, ids=[','.join(one) for one, _ in TENSORS])
def test_tensors_that_do_not_fit(tmp_path, changes, named):
  tensors = changed(cohere_tensors(), changes)
  check_refused(folders.write_hf(tmp_path / 'hf', CONFIG, tensors), named)


class Trap:
  """A pickle that leaves a trace if it is opened."""

  def __init__(self, trace: Path):
    self.trace = trace

  def __reduce__(self):
    return self.trace.touch, ()


@pytest.mark.parametrize(
  'name, text, named',
  [
    ('config.json', None, 'config.json cannot be read: No such file'),
    ('config.json', '[]', 'is not a JSON object'),
    ('adapter_config.json', '{}', 'adapter_config.json.* merge it into its base model first'),
    ('tokenizer.json', None, 'holds no tokenizer.json'),
    ('model.safetensors', None, 'has no model.safetensors.*pickles to safetensors first'),
  ],
)
def test_files_that_are_missing_or_too_many(tmp_path, name, text, named):
  """Beside a pickle, which nobody opens."""
  folder, trace = folders.write_hf(tmp_path / 'hf', CONFIG, cohere_tensors()), tmp_path / 'sprung'
  (folder / 'pytorch_model.bin').write_bytes(pickle.dumps(Trap(trace)))
  (folder / name).unlink(missing_ok=True)
  if text is not None:
    (folder / name).write_text(text)
  check_refused(folder, named)
  assert not trace.exists()


def test_a_folder_with_code_is_data(tmp_path):
  """What transformers runs if it is told to trust a folder is not looked at."""
  code = {'AutoConfig': 'trap.Config', 'AutoModelForCausalLM': 'trap.Model'}
  folder = folders.write_hf(tmp_path / 'hf', CONFIG | {'auto_map': code}, cohere_tensors())
  (folder / 'trap.py').write_text(f'open({str(tmp_path / "sprung")!r}, "w")')
  folders.write_json(folder / 'tokenizer_config.json', {'auto_map': {'AutoTokenizer': 'trap.It'}})
  convert(folder, tmp_path / 'ours')
  importing.open_any(str(folder)).tokenizer()
  assert not (tmp_path / 'sprung').exists()
  assert 'trap.py' not in {path.name for path in (tmp_path / 'ours').iterdir()}
