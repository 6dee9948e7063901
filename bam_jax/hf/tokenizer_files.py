"""What transformers' AutoTokenizer reads, from the one file that our tokenizers are."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from bam_jax.data.tokenizer import HUGGING_FACE_FILE, Tokenizer
from bam_jax.hf import files

# What pads a batch, in order of preference; else what ends documents.
PAD_TOKENS = ('<|pad|>', '<PAD>', '<pad>', '[PAD]', '<|padding|>')


def write(folder: Path, tokenizer: Tokenizer, length: int) -> dict[str, Any]:
  """Writes a tokenizer's file and, for a tokenizer.json, tokenizer_config.json.

  `length` is the number of tokens that the model was trained on at once. Returns the ids for
  config.json: `bos_token_id`, `eos_token_id` and `pad_token_id`, which may be None.
  """
  ids = {'bos_token_id': tokenizer.bos_id, 'eos_token_id': tokenizer.eos_id, 'pad_token_id': None}
  path = tokenizer.save(folder)
  if tokenizer.file_name != HUGGING_FACE_FILE:
    return ids
  backend = tokenizers.Tokenizer.from_file(str(path))
  plain = backend.encode('', add_special_tokens=False).ids
  if backend.encode('').ids != [tokenizer.bos_id, *plain]:
    path.write_text(_begin_with_bos(backend, tokenizer), encoding='utf-8')
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


def _begin_with_bos(backend: tokenizers.Tokenizer, tokenizer: Tokenizer) -> str:
  """A tokenizer.json whose texts begin with BOS and do not end with EOS, as prompts do here."""
  before = json.loads(backend.to_str())['post_processor'] or {'type': None}
  backend.post_processor = processors.TemplateProcessing(
    single=[tokenizer.bos_token, '$A'],
    pair=[tokenizer.bos_token, '$A', '$B'],
    special_tokens=[(tokenizer.bos_token, tokenizer.bos_id)],
  )
  facts = json.loads(backend.to_str())
  # Of the other rules, only ByteLevel adds no token: it corrects offsets.
  rules = [rule for rule in before.get('processors', [before]) if rule['type'] == 'ByteLevel']
  rules.append(facts['post_processor'])
  facts['post_processor'] = {'type': 'Sequence', 'processors': rules}
  return json.dumps(facts, indent=2, ensure_ascii=False)
