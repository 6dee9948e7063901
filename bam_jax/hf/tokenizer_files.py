"""Writes the files that transformers' AutoTokenizer reads, from our single tokenizer file."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from bam_jax.data.tokenizer import HUGGING_FACE_FILE, Tokenizer
from bam_jax.hf import files

# Padding tokens in order of preference; the fallback is EOS.
PAD_TOKENS = ('<|pad|>', '<PAD>', '<pad>', '[PAD]', '<|padding|>')


def write(folder: Path, tokenizer: Tokenizer, length: int) -> dict[str, Any]:
  """Writes a tokenizer's file and, for a tokenizer.json, tokenizer_config.json.

  `length` is the model's training sequence length. Returns the ids for config.json; that of padding
  may be None.
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
  begins_with_bos = backend.encode('').ids == [tokenizer.bos_id]
  if not begins_with_bos:
    _begin_with_bos(backend, tokenizer)
  if tokenizer.switched_off or not begins_with_bos:
    path.write_text(backend.to_str(pretty=True), encoding='utf-8')
  pad = next((name for name in PAD_TOKENS if backend.token_to_id(name) is not None), None)
  facts = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': tokenizer.bos_token,
    'eos_token': tokenizer.eos_token,
    'pad_token': pad or tokenizer.eos_token,
    'padding_side': 'left',
    'model_max_length': length,
    'clean_up_tokenization_spaces': False,
  }
  files.write_json(folder / 'tokenizer_config.json', facts)
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
