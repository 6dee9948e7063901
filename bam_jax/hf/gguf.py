"""GGUF files of Llama and Qwen 2 as what a folder of transformers holds, one tensor at a time.

Metadata become the keys of config.json. Tensors have the names of transformers and their order of
rows: in a file, Llama's queries and keys have the channels that RoPE pairs side by side. Values are
float32, as the package gguf unpacks them. The format: github.com/ggml-org/ggml, docs/gguf.md.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from bam_jax.checkpoint.arrays import Spec
from bam_jax.config.strict import require
from bam_jax.data.tokenizer import CONFIG_FILE, HUGGING_FACE_FILE, SENTENCEPIECE_FILE, Tokenizer
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.hf.parts import LENGTH

SUFFIX = '.gguf'
TYPES = 'F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K'.split()  # of tensors
STRIP = 1024  # rows unpacked at once
_ARCHITECTURES = {'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM'}
_REQUIRED = {
  'embedding_length': 'hidden_size', 'block_count': 'num_hidden_layers', 'context_length': LENGTH,
  'feed_forward_length': 'intermediate_size', 'attention.head_count': 'num_attention_heads',
  'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
}  # fmt: skip
_OPTIONAL = {
  'attention.head_count_kv': 'num_key_value_heads', 'attention.key_length': 'head_dim',
  'rope.freq_base': 'rope_theta',
}  # fmt: skip
_SCALING = {
  'factor': 'factor', 'original_context_length': 'original_max_position_embeddings',
  'yarn_beta_fast': 'beta_fast', 'yarn_beta_slow': 'beta_slow',
}  # fmt: skip
# Other keys of an architecture that are not off, and the values that change nothing.
_ALLOWED = {
  'rope.scaling.attn_factor': [1], 'rope.scaling.yarn_attn_factor': [1],
  'rope.scaling.yarn_ext_factor': [1, -1], 'rope.scale_linear': [1],
}  # fmt: skip
_IRRELEVANT = 'vocab_size', 'tensor_data_layout', 'rope.scaling.finetuned'
_NAMES = {
  'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head',
  'blk': 'model.layers', 'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm',
  'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj', 'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}  # fmt: skip
# How byte-level BPE cuts a text, by `tokenizer.ggml.pre`.
_BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
_DIGITS = {'type': 'Digits', 'individual_digits': True}
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+"
  r'[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_CUTS = {'gpt-2': [_BYTES], 'smollm': [_DIGITS, _BYTES]}
for _name, _digits in (('llama-bpe', '{1,3}'), ('qwen2', '')):
  _split = {'type': 'Split', 'pattern': {'Regex': _WORDS.format(_digits)}, 'invert': False}
  _CUTS[_name] = [_split | {'behavior': 'Isolated'}, _BYTES | {'use_regex': False}]
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6  # types of tokens, in both formats


class Reader:
  """The tensors of a file, by their names in transformers; `specs` has their shapes.

  `folder` is the file, for messages, `facts` the metadata, and `factors` those by which Llama 3
  divides frequencies, or None.
  """

  def __init__(self, path: Path):
    """Reads the metadata; UserError if the file is damaged, or its tensors cannot be read."""
    try:
      import gguf  # an extra
    except ImportError:
      raise UserError(f'{path} requires the package gguf: pip install gguf.') from None
    try:
      file = gguf.GGUFReader(path)
      self.facts = {name: field.contents() for name, field in file.fields.items()}
    except (OSError, ValueError, LookupError, OverflowError, TypeError) as error:
      wrong = f'it is damaged, cut short, or no {SUFFIX} file'
      raise UserError(f'{path} cannot be read ({folders.first_line(error)}): {wrong}.') from None
    require(file.byte_order == 'I', f'{path} is big-endian: only little-endian can be imported.')
    require(self.facts.get('split.count', 0) < 2, f'{path} is split: join its files first.')
    self.folder, self.specs, self._unpack, self._places = path, {}, gguf.dequantize, {}
    for tensor in file.tensors:
      kind = tensor.tensor_type
      wrong = f'{path} has {tensor.name} in {kind.name}: only {", ".join(TYPES)} can be imported.'
      require(kind.name in TYPES, wrong)
      name = '.'.join(_NAMES.get(part, part) for part in tensor.name.split('.'))
      self.specs[name] = Spec(tuple(tensor.shape[::-1].tolist()), np.dtype(np.float32))
      self._places[name] = kind, tensor.data_offset, tensor.n_bytes
    heads = self.facts.get('llama.attention.head_count')
    groups = self.facts.get('llama.attention.head_count_kv', heads)
    self._heads = {'.q_proj.': heads, '.k_proj.': groups} if heads else {}
    factors = 'rope_freqs.weight'
    self.factors = self.read(factors).astype(np.float64) if factors in self.specs else None
    self.specs.pop(factors, None)

  def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    """The values of one tensor, or of some rows; UserError when they cannot be read."""
    (kind, offset, nbytes), shape = self._places[name], self.specs[name].shape
    heads = next((count for part, count in self._heads.items() if part in name), 0)
    whole = bool(heads) or len(shape) == 1
    lines = shape[0] if len(shape) > 1 else 1
    start, stop, _ = (slice(None) if whole else rows).indices(lines)
    made = np.empty((stop - start, shape[-1]), np.float32)
    # Not mapped: mapped pages count as memory.
    with self.folder.open('rb') as file:
      file.seek(offset + start * nbytes // lines)
      for at in range(0, len(made), STRIP):
        part = made[at : at + STRIP]
        packed = np.fromfile(file, np.uint8, len(part) * nbytes // lines)
        wrong = f'{self.folder} ends within {name}: it is damaged or cut short.'
        require(packed.size == len(part) * nbytes // lines, wrong)
        part[:] = self._unpack(packed.reshape(len(part), -1), kind)
    if heads:
      made = made.reshape(heads, -1, 2, shape[-1] if len(shape) > 1 else 1).swapaxes(1, 2)
    return made.reshape(shape)[rows] if whole else made


def config_json(reader: Reader) -> dict[str, Any]:
  """What the config.json of the model says; UserError names metadata that do not fit."""
  kind = reader.facts.get('general.architecture')
  known = ' and '.join(_ARCHITECTURES)
  require(kind in _ARCHITECTURES, f'general.architecture={kind!r}: only {known} can be imported.')
  # A float32 as it was written: 1e-5, not 9.999999747378752e-06.
  own = {
    key.removeprefix(f'{kind}.'): float(str(np.float32(value))) if type(value) is float else value
    for key, value in reader.facts.items()
    if key.startswith(f'{kind}.')
  }
  experts = own.get('expert_count')
  require(not experts, f'{kind}.expert_count={experts} is a mixture: a seed must be dense.')
  for key in _REQUIRED:
    number = type(own.get(key)) in (int, float) and own[key] > 0
    require(number, f'{kind}.{key}={own.get(key)!r} is missing, or not a positive number.')
  made = {theirs: own.pop(ours, None) for ours, theirs in (_REQUIRED | _OPTIONAL).items()}
  head_dim = made['head_dim'] or made['hidden_size'] // made['num_attention_heads']
  for key in ('attention.value_length', 'rope.dimension_count'):
    wrong = f'{kind}.{key}={own.get(key)} differs from the {head_dim} channels of a key.'
    require(own.pop(key, head_dim) == head_dim, wrong)
  scaling = {'rope_type': own.pop('rope.scaling.type', 'none').replace('none', 'default')}
  if reader.factors is not None:
    require(scaling['rope_type'] == 'default', 'rope_freqs.weight and rope.scaling.type are given.')
    scaling = _llama3(reader.factors, made['rope_theta'] or 1e4, head_dim)
  elif scaling['rope_type'] != 'default':
    found = {theirs: own.pop(f'rope.scaling.{ours}', None) for ours, theirs in _SCALING.items()}
    scaling |= {key: value for key, value in found.items() if value is not None}
  for key, value in own.items():
    fits = not value or key in _IRRELEVANT or value in _ALLOWED.get(key, ())
    require(fits, f'{kind}.{key}={value!r} is not supported: the imported model might differ.')
  embedding = reader.specs.get('model.embed_tokens.weight')
  return made | {
    'architectures': [_ARCHITECTURES[kind]], 'model_type': kind, 'rope_scaling': scaling,
    'vocab_size': embedding.shape[0] if embedding else None,
    'tie_word_embeddings': 'lm_head.weight' not in reader.specs,
    'attention_bias': 'model.layers.0.self_attn.q_proj.bias' in reader.specs,
  }  # fmt: skip


def _llama3(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
  """The scaling that divides the frequencies of a head by these factors.

  A file has no more of it. The bounds are taken to be Llama 3's, 1 and 4 turns; then each factor
  between them gives the original length.
  """
  turns = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)  # a token
  factor, wrong = float(factors.max()), 'rope_freqs.weight is not a scaling of Llama 3'
  require(len(turns) == len(factors) and factors.min() >= 1, f'{wrong}: it cannot be imported.')
  if factor == 1:
    return {'rope_type': 'default'}
  kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
  lengths = ((1 + 3 * kept) / turns)[(kept > 1e-3) & (kept < 1 - 1e-3)]
  length = round(lengths[0]) if lengths.size else 8192
  kept = np.clip((length * turns - 1) / 3, 0, 1)
  fits = np.allclose(factors, 1 / (kept + (1 - kept) / factor), rtol=1e-5, atol=0)
  require(fits, f'{wrong} with the bounds 1 and 4: it cannot be imported.')
  return {
    'rope_type': 'llama3', 'factor': factor, 'original_max_position_embeddings': length,
    'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
  }  # fmt: skip


def tokenizer(reader: Reader, bos_token: str | None, eos_token: str | None) -> Tokenizer:
  """The tokenizer in a file; UserError if its metadata do not say all that it does."""
  read = lambda key, default=None: reader.facts.get(f'tokenizer.ggml.{key}', default)
  kind, cut, words, types = (read(key) for key in ('model', 'pre', 'tokens', 'token_type'))
  rebuilt = kind == 'llama' or kind == 'gpt2' and cut in _CUTS
  rebuilt = rebuilt and words and types and len(words) == len(types)
  if rebuilt and kind == 'llama':  # a model of transformers alone has no scores, but a constant
    scores = read('scores', [])
    rebuilt = len({one for one, type_ in zip(scores, types) if type_ == _NORMAL}) > 1
  which = f'{reader.folder} has a tokenizer of model {kind!r} and pre {cut!r}'
  require(rebuilt, f'{which}, which cannot be rebuilt from it: import with --tokenizer=FILE.')
  if kind == 'gpt2':
    content, name = _bpe(words, types, read('merges', []), cut), HUGGING_FACE_FILE
  else:
    proto, name = sentencepiece_model_pb2.ModelProto(), SENTENCEPIECE_FILE
    for word, score, type_ in zip(words, scores, types):
      proto.pieces.add(piece=word, score=score, type=type_)
    trained, normalizer = proto.trainer_spec, proto.normalizer_spec
    trained.model_type, trained.byte_fallback = trained.BPE, _BYTE in types
    for key, default in (('bos', 1), ('eos', 2), ('unknown', 0)):
      setattr(trained, f'{key[:3]}_id', read(f'{key}_token_id', default))
    trained.pad_id, trained.vocab_size = -1, len(words)
    normalizer.name, normalizer.add_dummy_prefix = 'identity', read('add_space_prefix', True)
    normalizer.remove_extra_whitespaces = read('remove_extra_whitespaces', False)
    content = proto.SerializeToString()
  numbers = {f'{key}_token': read(f'{key}_token_id', -1) for key in ('bos', 'eos')}
  facts = {key: words[n] for key, n in numbers.items() if 0 <= n < len(words)}
  facts |= {'chat_template': reader.facts.get('tokenizer.chat_template')}
  try:
    return Tokenizer(content, name, bos_token, eos_token, {CONFIG_FILE: json.dumps(facts).encode()})
  except UserError as error:
    raise UserError(f'The tokenizer in {reader.folder} {error}') from error


def _bpe(words: list[str], types: list[int], merges: list[str], cut: str) -> bytes:
  """A tokenizer.json."""
  plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
  added = [
    dict(id=number, content=word, special=type_ == _CONTROL, **plain)
    for number, (word, type_) in enumerate(zip(words, types))
    if type_ in (_CONTROL, _USER_DEFINED)
  ]
  affix = '' if cut == 'qwen2' else None  # as in its own file
  model = dict(type='BPE', dropout=None, unk_token=None, fuse_unk=False, byte_fallback=False)
  model |= dict(continuing_subword_prefix=affix, end_of_word_suffix=affix)
  vocab = {word: number for number, word in enumerate(words) if types[number] != _UNUSED}
  model |= dict(ignore_merges=cut == 'llama-bpe', vocab=vocab, merges=merges)
  facts = dict(
    version='1.0', truncation=None, padding=None, post_processor=None, added_tokens=added,
    normalizer={'type': 'NFC'} if cut == 'qwen2' else None, model=model,
    pre_tokenizer={'type': 'Sequence', 'pretokenizers': _CUTS[cut]},
    decoder=_BYTES | {'add_prefix_space': True},
  )  # fmt: skip
  return json.dumps(facts, ensure_ascii=False).encode()
