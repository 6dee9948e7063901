"""Small GGUF files, by the package's own writer, laid out as llama.cpp's converter does it."""

from pathlib import Path

import gguf
import numpy as np

from tests.hf import folders

NAMES = {
  'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output',
  'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm', 'model.layers': 'blk',
  'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output', 'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}  # fmt: skip
KEYS = {
  'hidden_size': 'embedding_length', 'num_hidden_layers': 'block_count',
  'intermediate_size': 'feed_forward_length', 'max_position_embeddings': 'context_length',
  'num_attention_heads': 'attention.head_count', 'num_key_value_heads': 'attention.head_count_kv',
  'rms_norm_eps': 'attention.layer_norm_rms_epsilon', 'head_dim': 'attention.key_length',
  'vocab_size': 'vocab_size', 'rope_theta': 'rope.freq_base',
}  # fmt: skip
KINDS = {bool: 'bool', int: 'uint32', float: 'float32', str: 'string', list: 'array'}


def metadata(facts: dict) -> dict:
  """A config.json and the tests' tokenizer as metadata."""
  rope = facts.get('rope_parameters') or {}
  facts = facts | {'rope_theta': rope.get('rope_theta')}
  found = {'expert_count': 0} | {ours: facts.get(key) for key, ours in KEYS.items()}
  if rope.get('rope_type') in ('linear', 'yarn'):
    found |= {'rope.scaling.type': rope['rope_type'], 'rope.scaling.factor': rope['factor']}
    length = rope.get('original_max_position_embeddings')
    found['rope.scaling.original_context_length'] = length
  meaning = folders.make_tokenizer()._backend.meaning()
  return {f'{facts["model_type"]}.{key}': value for key, value in found.items()} | {
    'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'smollm',
    'tokenizer.ggml.tokens': meaning['words'],
    'tokenizer.ggml.token_type': [3, 3] + [1] * (len(meaning['words']) - 2),  # BOS and EOS
    'tokenizer.ggml.merges': [' '.join(pair) for pair in meaning['model']['merges']],
  }  # fmt: skip


def renamed(facts: dict, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Tensors of transformers as the converter names and permutes them."""
  rope, made = facts.get('rope_parameters') or {}, {}
  heads = {'.q_proj.': facts['num_attention_heads'], '.k_proj.': facts['num_key_value_heads']}
  for name, array in tensors.items():
    for part, count in heads.items() if facts['model_type'] == 'llama' else ():
      if part in name:
        halves = array.reshape(count, 2, len(array) // count // 2, -1)
        array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
    for theirs, ours in NAMES.items():
      name = name.replace(theirs, ours)
    made[name] = array
  if rope.get('rope_type') == 'llama3':
    length, high = rope['original_max_position_embeddings'], rope['high_freq_factor']
    factor, low, factors = rope['factor'], rope['low_freq_factor'], []
    head_dim = facts.get('head_dim') or facts['hidden_size'] // facts['num_attention_heads']
    for channel in range(0, head_dim, 2):
      wave = 2 * np.pi * rope['rope_theta'] ** (channel / head_dim)
      smooth = (length / wave - low) / (high - low)
      between = 1 / ((1 - smooth) / factor + smooth)
      factors.append(1 if wave < length / high else factor if wave > length / low else between)
    made['rope_freqs.weight'] = np.asarray(factors, np.float32)
  return made


def write(path: Path, kind: str, facts: dict, tensors: dict, types: dict | None = None) -> Path:
  """A file of metadata and tensors; `types` has the quantisation of those that are packed bytes."""
  writer = gguf.GGUFWriter(path, kind)
  for key, value in facts.items():
    if value is not None:
      getattr(writer, f'add_{KINDS[type(value)]}')(key, value)
  for name, array in tensors.items():
    writer.add_tensor(name, array, raw_dtype=(types or {}).get(name))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path
