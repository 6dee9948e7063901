"""Turns text into token shards: JSON lines, Parquet or plain text in, a prepared dataset out.

    python -m bam_jax.prepare --input=my_text/ --output=data/mine --train_tokenizer=8192
    python -m bam_jax.prepare --input=law=acts/ --input=code=py.parquet --output=data/mine \\
      --tokenizer=tokenizer.json

A run that was stopped goes on where it was; a finished one is left as it is. A sample of each
domain is encoded and decoded, and the share of its characters that come back is reported. `--json`
writes the manifest: `domains.<domain>.<split>.{documents, tokens, bytes, skipped, shards}`,
`decoded.<domain>`, `tokenizer`, `sources`, `left_out`, the options, and beside it `output`,
`seconds` and `already_prepared`.
"""

import time
from pathlib import Path
from typing import Any

from absl import flags

from bam_jax import cli
from bam_jax.data import prepare
from bam_jax.data.sources import find_domains
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError

LOSSLESS = 0.999  # below this share of characters that come back, a warning is printed

_INPUT = flags.DEFINE_multi_string(
  'input', [], 'DOMAIN=PATH, once for each domain, or one FOLDER whose entries are the domains.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to make; unfinished work lies in it.partial.')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, 'A tokenizer.json, a SentencePiece .model, or a folder that holds one.'
)
_BOS_TOKEN = flags.DEFINE_string('bos_token', None, 'Begins documents; default: a well-known one.')
_EOS_TOKEN = flags.DEFINE_string('eos_token', None, 'Ends documents; default: a well-known one.')
_OPTIONS = {  # of prepare.prepare
  holder.name: holder
  for holder in (
    flags.DEFINE_integer(
      'train_tokenizer', None, 'Train byte-level BPE with so many tokens on the train text instead.'
    ),
    flags.DEFINE_integer(
      'tokenizer_bytes', prepare.TOKENIZER_BYTES, 'Bytes of each domain to train a tokenizer on.'
    ),
    flags.DEFINE_float(
      'valid_fraction', prepare.VALID_FRACTION, 'Share held out where no file is marked valid.'
    ),
    flags.DEFINE_string('text_field', 'text', 'JSON field or Parquet column of the text.'),
    flags.DEFINE_integer('shard_tokens', prepare.SHARD_TOKENS, 'The most tokens of a shard.'),
    flags.DEFINE_float(
      'min_decoded', prepare.MIN_DECODED, 'Share of the characters that a tokenizer must give back.'
    ),
    flags.DEFINE_integer('workers', 1, 'Processes; 1 uses the threads of this one.'),
  )
}


def main() -> dict[str, Any]:
  """Prepares the dataset that the flags ask for, and prints what it holds."""
  if not _OUTPUT.value:
    raise UserError('--output is required: give --output=FOLDER.')
  start, domains, tokenizer = time.monotonic(), find_domains(_INPUT.value), None
  if _TOKENIZER.value:
    tokenizer = Tokenizer.load(_TOKENIZER.value, _BOS_TOKEN.value, _EOS_TOKEN.value)
  elif _BOS_TOKEN.value or _EOS_TOKEN.value:
    raise UserError('--bos_token and --eos_token go with --tokenizer=PATH only.')
  already = Path(_OUTPUT.value, 'manifest.json').exists()
  options = {name: holder.value for name, holder in _OPTIONS.items()}
  with cli.bytes_bar('Reading') as progress:
    facts = prepare.prepare(
      domains, _OUTPUT.value, tokenizer=tokenizer, progress=progress, **options
    )
  seconds = time.monotonic() - start
  _print(facts, tokenizer, 'Already prepared.' if already else f'Prepared in {seconds:.1f} s.')
  return facts | dict(output=_OUTPUT.value, seconds=seconds, already_prepared=already)


def _print(facts: dict[str, Any], tokenizer: Tokenizer | None, end: str) -> None:
  console, decoded, rows = cli.console(), facts.get('decoded', {}), []
  for domain, splits in facts['domains'].items():
    for split, entry in splits.items():
      ratio, skipped = f'{entry["bytes"] / entry["tokens"]:.2f}', sum(entry['skipped'].values())
      rows.append([domain, split, entry['documents'], entry['tokens'], ratio, skipped])
  title = f'{_OUTPUT.value}, vocabulary {facts["tokenizer"]["vocab_size"]:,}'
  columns = 'documents', 'tokens', 'bytes/token', 'skipped'
  console.print(cli.table(title, ('domain', 'split'), columns, rows))
  shares = ', '.join(f'{domain} {share:.2%}' for domain, share in decoded.items())
  console.print('Characters of a sample that come back from their tokens:', shares)
  if min(decoded.values(), default=1) < LOSSLESS:
    console.print('WARNING: this tokenizer loses text; a model cannot learn what it never sees.')
  if tokenizer and tokenizer.switched_off:
    console.print(f'Switched off in the tokenizer: {", ".join(tokenizer.switched_off)}.')
  if facts['left_out']:
    console.print('Left out (test, or of an unknown kind):', ', '.join(facts['left_out']))
  console.print(end)


if __name__ == '__main__':
  cli.run(main)
