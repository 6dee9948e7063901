"""Converts a checkpoint to a folder that transformers loads, tokenizer included.

    python -m bam_jax.convert export-hf --checkpoint=runs/mine/bam_kv --output=hf/bam_kv

A model becomes the class of transformers that computes it: a dense one LlamaForCausalLM or another
family's, a mixture of FFN experts alone Qwen2MoeForCausalLM, MixtralForCausalLM or another whose
gates are the same. --architecture names another class that computes it. Every other model becomes
BamForCausalLM, whose code is in the folder:
AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True). The folder's README.md describes
the model, its sources and how to load it. Arrays are streamed, one layer of one expert at a time,
without torch.

`--json` writes `output`, `seconds`, `architecture`, `dtype`, `tensors`, `bytes` and `files`.
"""

import re
import sys
import time
from typing import Any

from absl import flags

from bam_jax import cli
from bam_jax.config.strict import require
from bam_jax.hf import exporting

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'A run, a step, or an output of convert.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to create.')
_DTYPE = flags.DEFINE_enum('dtype', None, exporting.DTYPES, 'Except routers; default: unchanged.')
_ARCHITECTURE = flags.DEFINE_string('architecture', None, 'Class to export as; default: found.')
_MAX_SHARD_SIZE = flags.DEFINE_string('max_shard_size', '5GB', 'Of a file, such as 500MB or 5GB.')


def main() -> dict[str, Any]:
  """Exports the checkpoint that the flags name; returns facts about the folder."""
  checkpoint, output, size = _CHECKPOINT.value, _OUTPUT.value, _MAX_SHARD_SIZE.value
  require(checkpoint and output, '--checkpoint and --output are required.')
  valid = re.fullmatch(r'[1-9]\d{0,8}[KMGT]B', size, re.ASCII)
  require(valid, f'--max_shard_size={size} is not a size such as 500MB or 5GB.')
  options = dict(dtype=_DTYPE.value, architecture=_ARCHITECTURE.value or None)
  start = time.monotonic()
  with cli.bytes_bar('Exporting') as progress:
    facts = exporting.convert(checkpoint, output, max_shard_size=size, progress=progress, **options)
  seconds, count = time.monotonic() - start, len(facts['files'])
  where = '1 file' if count == 1 else f'{count} files'
  print(f'{output}: {facts["architecture"]} in {where}, {seconds:.1f} s.', file=sys.stderr)
  return {'output': output, 'seconds': seconds, **facts}
