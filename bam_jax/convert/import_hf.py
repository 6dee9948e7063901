"""A folder for transformers to a checkpoint: what main, evaluate, generate and inspect take.

    python -m bam_jax.convert import-hf --input=aya-expanse-8b/ --output=seeds/aya

The folder holds config.json, tokenizer.json and safetensors, in one file or in several with their
index, as `save_pretrained` or a download leaves them. It is read one tensor at a time, without
torch, and nothing in it is run or unpickled. CohereForCausalLM fits without loss; so do
Cohere2ForCausalLM, if every layer rotates positions and sees everything, and BamForCausalLM, which
`export-hf` makes. Any other model is refused: the sentence says what does not fit.

A recipe starts from the result with init={'checkpoint': DIR}, its data prepared with the same
tokenizer: python -m bam_jax.prepare --tokenizer=DIR/tokenizer.json.

`--json` writes `output`, `seconds` and `meta`: the model, and under `manifest` a hash of every
tensor and what became of it.
"""

import sys
import time
from typing import Any

from absl import flags

from bam_jax import cli
from bam_jax.config import strict
from bam_jax.errors import UserError
from bam_jax.hf import importing
from bam_jax.model import arithmetic

_INPUT = flags.DEFINE_string('input', None, 'Folder of the model.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to make.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'), 'Of the arrays on disk.')
_TOKENIZER = flags.DEFINE_string('tokenizer', None, 'Its tokenizer, if not in that folder.')
_BOS_TOKEN = flags.DEFINE_string('bos_token', None, 'Begins documents; default: a well-known one.')
_EOS_TOKEN = flags.DEFINE_string('eos_token', None, 'Ends documents; default: a well-known one.')


def main() -> dict[str, Any]:
  """Imports what the flags name, and prints what came out."""
  if not (_INPUT.value and _OUTPUT.value):
    raise UserError('From where and where to? Give --input and --output.')
  start = time.monotonic()
  with cli.bytes_bar('Importing') as progress:
    meta = importing.convert(
      _INPUT.value,
      _OUTPUT.value,
      dtype=_DTYPE.value,
      tokenizer=_TOKENIZER.value,
      bos_token=_BOS_TOKEN.value,
      eos_token=_EOS_TOKEN.value,
      command=cli.command(),
      progress=progress,
    )
  seconds = time.monotonic() - start
  count = arithmetic.parameters(meta.model).total
  print(f'{_OUTPUT.value}: {count:,} parameters, {seconds:.1f} s.', file=sys.stderr)
  return {'output': _OUTPUT.value, 'seconds': seconds, 'meta': strict.to_dict(meta)}
