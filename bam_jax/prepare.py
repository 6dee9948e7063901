"""Turns text into token shards: JSON lines, Parquet or plain text in, a prepared dataset out.

    python -m bam_jax.prepare --input=my_text/ --output=data/mine --train_tokenizer=8192
    python -m bam_jax.prepare --input=law=acts/ --input=code=py.parquet --output=data/mine \\
      --tokenizer=tokenizer.json

A run that was stopped goes on where it was; a finished one is left as it is. `--json` writes the
manifest: `domains.<domain>.<split>.{documents, tokens, bytes, skipped, shards}`, `tokenizer`,
`sources`, `left_out`, the options, and beside it `output`, `seconds` and `already_prepared`.
"""

import time
from pathlib import Path
from typing import Any

import rich.console
import rich.table
from absl import flags

from bam_jax import cli
from bam_jax.data.prepare import SHARD_TOKENS, TOKENIZER_BYTES, VALID_FRACTION, prepare
from bam_jax.data.sources import find_domains
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError

_INPUT = flags.DEFINE_multi_string(
  'input', [], 'DOMAIN=PATH, once for each domain, or one FOLDER whose entries are the domains.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to make; unfinished work lies in it.partial.')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, 'A tokenizer.json, a SentencePiece .model, or a folder that holds one.'
)
_TRAIN_TOKENIZER = flags.DEFINE_integer(
  'train_tokenizer', None, 'Train byte-level BPE with so many tokens on the train text instead.'
)
_TOKENIZER_BYTES = flags.DEFINE_integer(
  'tokenizer_bytes', TOKENIZER_BYTES, 'Bytes of each domain to train a tokenizer on.'
)
_BOS_TOKEN = flags.DEFINE_string('bos_token', None, 'Begins documents; default: a well-known one.')
_EOS_TOKEN = flags.DEFINE_string('eos_token', None, 'Ends documents; default: a well-known one.')
_VALID_FRACTION = flags.DEFINE_float(
  'valid_fraction', VALID_FRACTION, 'Share held out where no file is marked valid.'
)
_TEXT_FIELD = flags.DEFINE_string('text_field', 'text', 'JSON field or Parquet column of the text.')
_SHARD_TOKENS = flags.DEFINE_integer('shard_tokens', SHARD_TOKENS, 'The most tokens of a shard.')
_WORKERS = flags.DEFINE_integer('workers', 1, 'Processes; 1 uses the threads of this one.')


def main() -> dict[str, Any]:
  """Prepares the dataset that the flags ask for, and prints what it holds."""
  console = rich.console.Console(stderr=True, markup=False, highlight=False)
  if not _OUTPUT.value:
    raise UserError('Where to? Give --output=FOLDER.')
  start, domains, tokenizer = time.monotonic(), find_domains(_INPUT.value), None
  if _TOKENIZER.value:
    tokenizer = Tokenizer.load(_TOKENIZER.value, _BOS_TOKEN.value, _EOS_TOKEN.value)
  elif _BOS_TOKEN.value or _EOS_TOKEN.value:
    raise UserError('--bos_token and --eos_token go with --tokenizer=PATH only.')
  already = Path(_OUTPUT.value, 'manifest.json').exists()
  with cli.bytes_bar('Reading') as progress:
    manifest = prepare(
      domains,
      _OUTPUT.value,
      tokenizer=tokenizer,
      train_tokenizer=_TRAIN_TOKENIZER.value,
      valid_fraction=_VALID_FRACTION.value,
      text_field=_TEXT_FIELD.value,
      shard_tokens=_SHARD_TOKENS.value,
      tokenizer_bytes=_TOKENIZER_BYTES.value,
      workers=_WORKERS.value,
      progress=progress,
    )
  seconds = time.monotonic() - start
  console.print(_table(manifest, _OUTPUT.value))
  if manifest['left_out']:
    console.print('Left out (test, or of an unknown kind):', ', '.join(manifest['left_out']))
  console.print('Already prepared.' if already else f'Prepared in {seconds:.1f} s.')
  return manifest | dict(output=_OUTPUT.value, seconds=seconds, already_prepared=already)


def _table(manifest: dict[str, Any], output: str) -> rich.table.Table:
  facts = manifest['tokenizer']
  table = rich.table.Table(title=f'{output}, vocabulary {facts["vocab_size"]:,}')
  for name in ('domain', 'split'):
    table.add_column(name)
  for name in ('documents', 'tokens', 'bytes/token', 'skipped'):
    table.add_column(name, justify='right')
  for domain, splits in manifest['domains'].items():
    for split, entry in splits.items():
      documents, tokens = entry['documents'], entry['tokens']
      ratio, skipped = entry['bytes'] / tokens, sum(entry['skipped'].values())
      table.add_row(domain, split, f'{documents:,}', f'{tokens:,}', f'{ratio:.2f}', f'{skipped:,}')
  return table


if __name__ == '__main__':
  cli.run(main)
