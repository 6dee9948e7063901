"""What transformers' AutoTokenizer reads, from the one file that our tokenizers are."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from bam_jax.data.tokenizer import HUGGING_FACE_FILE, Tokenizer

# What pads a batch, in order of preference; else what ends documents.
PAD_TOKENS = ('<|pad|>', '<PAD>', '<pad>', '[PAD]', '<|padding|>')


def write(folder: Path, file: Path, tokenizer: Tokenizer, length: int) -> dict[str, Any]:
  """Writes a tokenizer's file and, for a tokenizer.json, tokenizer_config.json.

  A tokenizer.json that puts nothing before a text gets a rule that puts the beginning of a document
  there, as in our data; any other is copied as it is. A SentencePiece model is copied too, but
  AutoTokenizer would only guess how to read it.

  Args:
    folder: exists.
    file: the tokenizer's.
    tokenizer: what the file holds.
    length: tokens that the model was trained on at once.

  Returns:
    The ids of config.json: `bos_token_id`, `eos_token_id` and `pad_token_id`, None without one.
  """
  ids = {'bos_token_id': tokenizer.bos_id, 'eos_token_id': tokenizer.eos_id, 'pad_token_id': None}
  content = file.read_bytes()
  if tokenizer.file_name != HUGGING_FACE_FILE:
    (folder / tokenizer.file_name).write_bytes(content)
    return ids
  backend = tokenizers.Tokenizer.from_str(content.decode())
  if not backend.num_special_tokens_to_add(is_pair=False):
    begin = processors.TemplateProcessing(
      single=[tokenizer.bos_token, '$A'],
      pair=[tokenizer.bos_token, '$A', '$B'],
      special_tokens=[(tokenizer.bos_token, tokenizer.bos_id)],
    )
    before = backend.post_processor
    backend.post_processor = processors.Sequence([before, begin]) if before else begin
    content = backend.to_str(pretty=True).encode()
  (folder / tokenizer.file_name).write_bytes(content)
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
  text = json.dumps(facts, indent=1, ensure_ascii=False) + '\n'
  (folder / 'tokenizer_config.json').write_text(text, encoding='utf-8')
  return ids | {'pad_token_id': pad and backend.token_to_id(pad)}
