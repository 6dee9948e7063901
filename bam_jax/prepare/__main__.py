"""Turns text into a prepared dataset: JSON lines, Parquet or plain text in, shuffled tokens out.

    python -m bam_jax.prepare --input=my_text/ --output=data/mine --train_tokenizer=8192
    python -m bam_jax.prepare --input=law=acts/ --input=code=py.parquet --output=data/mine \\
      --tokenizer=tokenizer.json

An interrupted run resumes; a finished dataset is left unchanged. "decoded" is the share of a
sample's characters that survive encoding and decoding. `--json` writes the manifest:
`domains.<domain>.<split>.{documents, tokens, bytes, skipped}`, `decoded.<domain>`, `tokenizer`,
`switched_off`, `sources`, `left_out`, the options, and `output`, `seconds`, `already_prepared`.
"""

import time
from typing import Any

from absl import flags

from bam_jax import cli
from bam_jax.data import store
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.files import folders
from bam_jax.prepare import dataset
from bam_jax.prepare.sources import find_domains

OPTIONS = (
  'train_tokenizer', 'valid_fraction', 'text_field', 'skip_unknown', 'min_decoded', 'shuffle_seed',
)  # fmt: skip

_INPUT = flags.DEFINE_multi_string(
  'input', [], 'DOMAIN=PATH, once for each domain, or one FOLDER with an entry for each domain.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to create, or gs://BUCKET/FOLDER.')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, 'A tokenizer.json, a SentencePiece .model, or a folder that holds one.'
)
_BOS = flags.DEFINE_string('bos_token', None, 'Begins documents; default: a well-known token.')
_EOS = flags.DEFINE_string('eos_token', None, 'Ends documents; default: a well-known token.')
flags.DEFINE_integer('train_tokenizer', None, 'Train byte-level BPE with this vocabulary size.')
flags.DEFINE_float('valid_fraction', dataset.VALID_FRACTION, 'Held out if no file is named valid*.')
flags.DEFINE_string('text_field', 'text', 'JSON field or Parquet column of the text.')
flags.DEFINE_bool('skip_unknown', False, 'Leave out files of a kind that cannot be read.')
flags.DEFINE_float('min_decoded', dataset.MIN_DECODED, 'Minimum share of characters that survive.')
flags.DEFINE_integer('shuffle_seed', 0, 'Of the order of the documents.', lower_bound=0)


def main() -> dict[str, Any]:
  """Prepares the dataset that the flags describe, and prints its contents."""
  if not _OUTPUT.value:
    raise UserError('--output is required: give --output=FOLDER.')
  start, domains, tokenizer = time.monotonic(), find_domains(_INPUT.value), None
  if _TOKENIZER.value:
    tokenizer = Tokenizer.load(_TOKENIZER.value, _BOS.value, _EOS.value)
  elif _BOS.value or _EOS.value:
    raise UserError('--bos_token and --eos_token require --tokenizer=PATH.')
  folders.check_bucket(_OUTPUT.value)
  already = (folders.at(_OUTPUT.value) / store.MANIFEST).exists()
  options = {name: flags.FLAGS[name].value for name in OPTIONS}
  with cli.bytes_bar('Reading') as progress:
    options |= dict(tokenizer=tokenizer, progress=progress)
    facts = dataset.prepare(domains, _OUTPUT.value, **options)
  facts |= dict(output=_OUTPUT.value, seconds=time.monotonic() - start, already_prepared=already)
  _print(facts)
  return facts


def _print(facts: dict[str, Any]) -> None:
  console, rows = cli.console(), []
  for domain, splits in facts['domains'].items():
    for split, entry in splits.items():
      ratio, skipped = f'{entry["bytes"] / entry["tokens"]:.2f}', sum(entry['skipped'].values())
      share = f'{facts["decoded"][domain]:.2%}'
      rows.append([domain, split, entry['documents'], entry['tokens'], ratio, skipped, share])
  title = f'{facts["output"]}, vocabulary {facts["tokenizer"]["vocab_size"]:,}'
  columns = 'documents', 'tokens', 'bytes/token', 'skipped', 'decoded'
  console.print(cli.table(title, ('domain', 'split'), columns, rows))
  for line in dataset.warnings(facts):
    console.print(line)
  if facts['left_out']:
    console.print('Left out (test split or unknown file type):', ', '.join(facts['left_out']))
  already = facts['already_prepared']
  console.print('Already prepared.' if already else f'Prepared in {facts["seconds"]:.1f} s.')


if __name__ == '__main__':
  cli.run(main)
