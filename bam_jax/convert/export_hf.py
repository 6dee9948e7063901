"""A checkpoint to a folder that transformers loads, tokenizer included.

    python -m bam_jax.convert export-hf --checkpoint=runs/mine/bam_kv --output=hf/bam_kv

A dense model becomes CohereForCausalLM, which transformers knows. A mixture becomes BamForCausalLM,
whose code lies in the folder: AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).
README.md says what the model is, where it comes from and how to load it. Arrays stream through
memory one layer of one expert at a time, without torch.

`--json` writes `output`, `seconds`, `architecture`, `dtype`, `tensors`, `bytes` and `files`.
"""

import re
import sys
import time
from typing import Any

from absl import flags

from bam_jax import cli
from bam_jax.errors import UserError
from bam_jax.hf import exporting

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, "A run's folder, or a checkpoint's.")
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to make.')
_DTYPE = flags.DEFINE_enum(
  'dtype', None, ('float32', 'bfloat16'), 'Of all tensors but routers; default: as they are.'
)
_MAX_SHARD_SIZE = flags.DEFINE_string('max_shard_size', '5GB', 'Of a file: 500MB, 5GB, 2GiB.')
_UNITS = {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9, 'KIB': 2**10, 'MIB': 2**20, 'GIB': 2**30}


def main() -> dict[str, Any]:
  """Exports what the flags name, and prints what came out."""
  if not (_CHECKPOINT.value and _OUTPUT.value):
    raise UserError('What and where to? Give --checkpoint and --output.')
  start = time.monotonic()
  with cli.bytes_bar('Exporting') as progress:
    facts = exporting.convert(
      _CHECKPOINT.value,
      _OUTPUT.value,
      dtype=_DTYPE.value,
      max_shard_bytes=_bytes(_MAX_SHARD_SIZE.value),
      progress=progress,
    )
  seconds = time.monotonic() - start
  print(
    f'{_OUTPUT.value}: {facts["architecture"]} in {len(facts["files"])} files, {seconds:.1f} s.',
    file=sys.stderr,
  )
  return {'output': _OUTPUT.value, 'seconds': seconds, **facts}


def _bytes(size: str) -> int:
  match = re.fullmatch(r'(\d{1,18})\s*([KMG]i?B)?', size, re.IGNORECASE)
  if not match or not int(match[1]):
    raise UserError(f'--max_shard_size={size} is no size: give one such as 500MB or 5GB.')
  return int(match[1]) * _UNITS[(match[2] or '').upper()]
