"""Converts a Hugging Face model to a checkpoint for main, evaluate, generate and inspect.

    python -m bam_jax.convert import-hf --input=aya-expanse-8b/ --output=seeds/aya

The folder holds config.json, tokenizer.json and safetensors, in one file or in several with their
index, as `save_pretrained` or a download leaves them. It is read one tensor at a time, without
torch, and nothing in it is executed or unpickled. Llama, Mistral, Qwen 2 and 3, SmolLM 3, OLMo 2
and 3, Phi-3, Granite, GPT-NeoX, Gemma 2 and 3, Cohere and Cohere 2 are converted without loss, and
BamForCausalLM, the output of `export-hf`. Any other model is refused with an error that says what
does not fit.

--input may also be a GGUF file of Llama or Qwen 2, of which quantised values are unpacked.

A recipe starts from the result with init={'checkpoint': DIR}, with data prepared with the same
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
from bam_jax.hf import importing
from bam_jax.model import arithmetic

_INPUT = flags.DEFINE_string('input', None, 'Folder of the model, or a GGUF file.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to create.')
_OPTIONS = (
  flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'), 'Dtype on disk.'),
  flags.DEFINE_string('tokenizer', None, 'Its tokenizer, if not in the folder.'),
  flags.DEFINE_string('bos_token', None, 'Begins documents; default: a well-known token.'),
  flags.DEFINE_string('eos_token', None, 'Ends documents; default: a well-known token.'),
)


def main() -> dict[str, Any]:
  """Imports the folder that the flags name; returns facts about the checkpoint."""
  source, output, start = _INPUT.value, _OUTPUT.value, time.monotonic()
  strict.require(source and output, '--input and --output are required.')
  options = {flag.name: flag.value for flag in _OPTIONS}
  with cli.bytes_bar('Importing') as progress:
    meta = importing.convert(source, output, command=cli.command(), progress=progress, **options)
  seconds, count = time.monotonic() - start, arithmetic.parameters(meta.model).total
  print(f'{output}: {count:,} parameters, {seconds:.1f} s.', file=sys.stderr)
  return {'output': output, 'seconds': seconds, 'meta': strict.to_dict(meta)}
