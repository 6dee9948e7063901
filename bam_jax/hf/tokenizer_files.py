"""Writes the files that transformers' AutoTokenizer reads, from our single tokenizer file."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from bam_jax.data.tokenizer import CONFIG_FILE, HUGGING_FACE_FILE, TEMPLATE_FILE, Tokenizer
from bam_jax.hf import files

# Padding tokens in order of preference, after the tokenizer's own; the fallback is EOS.
PAD_TOKENS = ('<|pad|>', '<PAD>', '<pad>', '[PAD]', '<|padding|>')
# Keys that are not carried over: code, paths, and what tokenizer.json does already.
_DROPPED = ('auto_map', 'name_or_path', 'tokenizer_file', 'add_bos_token', 'add_eos_token')


def write(folder: Path, tokenizer: Tokenizer, length: int) -> dict[str, Any]:
  """Writes a tokenizer's file and, for a tokenizer.json, tokenizer_config.json.

  `length` is the model's training sequence length. Returns the ids for config.json; that of padding
  may be None. Keys of the tokenizer's own tokenizer_config.json are kept, and its chat template is,
  unless it writes a BOS or EOS that is not ours.
  """
  ids = {'bos_token_id': tokenizer.bos_id, 'eos_token_id': tokenizer.eos_id, 'pad_token_id': None}
  path = tokenizer.save(folder)
  if tokenizer.file_name != HUGGING_FACE_FILE:
    return ids
  backend = tokenizers.Tokenizer.from_file(str(path))
  backend.no_truncation()
  backend.no_padding()
  if 'dropout' in tokenizer.switched_off:
    backend.model.dropout = None
  text = backend.encode('', add_special_tokens=False)
  text.pad(1, pad_id=tokenizer.bos_id + 1)  # some token, since BOS may be EOS too
  begins_with_bos = backend.post_process(text).ids == [tokenizer.bos_id, tokenizer.bos_id + 1]
  if not begins_with_bos:
    _begin_with_bos(backend, tokenizer)
  if tokenizer.switched_off or not begins_with_bos:
    path.write_text(backend.to_str(pretty=True), encoding='utf-8')
  carried = files.read_json(folder / CONFIG_FILE) if CONFIG_FILE in tokenizer.beside else {}
  text_of = lambda token: token.get('content') if isinstance(token, dict) else token
  theirs = {name: text_of(carried.get(name)) for name in ('bos_token', 'eos_token')}
  own = text_of(carried.get('pad_token'))
  pads = (own, *PAD_TOKENS) if isinstance(own, str) and own != tokenizer.eos_token else PAD_TOKENS
  pad = next((name for name in pads if backend.token_to_id(name) is not None), None)
  facts = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': tokenizer.bos_token,
    'eos_token': tokenizer.eos_token,
    'pad_token': pad or tokenizer.eos_token,
    'padding_side': 'left',
    'model_max_length': length,
    'clean_up_tokenization_spaces': False,
  }
  file = folder / TEMPLATE_FILE
  template = file.read_text('utf-8') if file.exists() else json.dumps(carried.get('chat_template'))
  for name, token in theirs.items():
    if name in template and token != facts[name]:
      carried.pop('chat_template', None)
      file.unlink(missing_ok=True)
  kept = {key: value for key, value in carried.items() if key not in _DROPPED}
  files.write_json(folder / CONFIG_FILE, kept | facts)
  return ids | {'pad_token_id': pad and backend.token_to_id(pad)}


def _begin_with_bos(backend: tokenizers.Tokenizer, tokenizer: Tokenizer) -> None:
  """Makes texts begin with BOS and not end with EOS, like prompts."""
  before = backend.post_processor
  rules = before if isinstance(before, processors.Sequence) else [before]
  # Among the rules, only ByteLevel adds no token: it corrects offsets.
  kept = [rule for rule in rules if isinstance(rule, processors.ByteLevel)]
  template = processors.TemplateProcessing(
    single=[tokenizer.bos_token, '$A'],
    pair=[tokenizer.bos_token, '$A', '$B'],
    special_tokens=[(tokenizer.bos_token, tokenizer.bos_id)],
  )
  backend.post_processor = processors.Sequence([*kept, template])
