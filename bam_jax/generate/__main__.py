"""Continues prompts with any checkpoint: dense, average or mixture.

    python -m bam_jax.generate --checkpoint=runs/quickstart/bam_kv --prompt='The court '
    python -m bam_jax.generate --checkpoint=DIR --prompt='def f(x):' --temperature=0.8 --top_p=0.95
    python -m bam_jax.generate --checkpoint=DIR --prompts=prompts.jsonl --num_samples=4 \
        --temperature=1 --json=samples.json

A single continuation streams to standard output. `--mesh=expert=4` keeps each attention expert, its
keys and values, and its share of the FFN experts on a device of its own; data and fsdp cut the rows
of a batch, tensor heads and columns. A continuation ends with the tokenizer's end token, at a
`--stop`, or after --max_new_tokens.

`--json` writes `checkpoint`, `dtype`, `mesh`, and `rows`, in the order of the prompts:
  prompt, sample: what was continued, and which time.
  text, tokens: the continuation without what ended it; its tokens, those of a `--stop` included.
  reason: 'end', 'stop' or 'length'.
With `--json=-` that alone is on standard output.
"""

import signal
import sys
from typing import Any

import jax
from absl import flags

from bam_jax import cli, config
from bam_jax.errors import UserError
from bam_jax.generate import loading, sampling, session, text
from bam_jax.parallel import compilation, sharding

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'A run, one of its steps, or a conversion.')
_PROMPT = flags.DEFINE_multi_string('prompt', [], 'Text to continue; may be given again.')
_PROMPTS = flags.DEFINE_string('prompts', None, 'A file: a prompt a line, or .jsonl with `prompt`.')
_MOST = flags.DEFINE_integer('max_new_tokens', 128, 'Tokens to make, at most.', lower_bound=1)
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 takes the most probable token.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Choose among so many words; 0 is all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Choose among the words with this share of the mass.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of all draws.')
_SAMPLES = flags.DEFINE_integer('num_samples', 1, 'Continuations of each prompt.', lower_bound=1)
_STOP = flags.DEFINE_multi_string('stop', [], 'Text that ends a continuation; may be given again.')
_BATCH = flags.DEFINE_integer('batch_size', 8, 'The most continuations at once.', lower_bound=1)
_DTYPE = flags.DEFINE_enum(
  'dtype', None, ['float32', 'bfloat16'], 'Default: float32 on CPU, bfloat16 elsewhere.'
)
_MESH = flags.DEFINE_list('mesh', [], 'Devices along axes: data=2,expert=4.')


def main() -> dict[str, Any]:
  """Continues what the flags ask for, and prints it."""
  if not _CHECKPOINT.value:
    raise UserError('Which model? Give --checkpoint=DIR.')
  options = sampling.Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
  if _SAMPLES.value > 1 and not options.temperature:
    raise UserError('--num_samples at temperature 0 are all the same: give --temperature=1, say.')
  for prompt in (*_PROMPT.value, *_STOP.value):
    text.check(prompt, f'{ascii(prompt)[:80]} on the command line')
  prompts = [*_PROMPT.value, *(text.read_prompts(_PROMPTS.value) if _PROMPTS.value else [])]
  if not prompts:
    raise UserError("What to continue? Give --prompt='...' or --prompts=FILE.")
  compilation.use_cache()
  dtype = _DTYPE.value or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
  sizes = cli.parse_mesh(_MESH.value)
  loaded = loading.load(_CHECKPOINT.value, dtype, sharding.make_mesh(sizes))
  output = sys.stderr if flags.FLAGS.json == '-' else sys.stdout
  for signum in (signal.SIGPIPE, signal.SIGINT):
    signal.signal(signum, signal.SIG_DFL)  # a reader that has seen enough: no traceback
  reader = session.Session(loaded, options, _MOST.value, _SEED.value, tuple(_STOP.value), output)
  rows = reader.run(prompts, _SAMPLES.value, _BATCH.value)
  mesh = config.to_dict(sizes)
  return {'checkpoint': _CHECKPOINT.value, 'dtype': dtype, 'mesh': mesh, 'rows': rows}


if __name__ == '__main__':
  cli.run(main)
