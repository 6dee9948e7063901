"""Generates continuations of prompts with any checkpoint: dense, average or mixture.

    python -m bam_jax.generate --checkpoint=runs/quickstart/bam_kv --prompt='The court '
    python -m bam_jax.generate --checkpoint=DIR --prompt='def f(x):' --temperature=0.8 --top_p=0.95
    python -m bam_jax.generate --checkpoint=DIR --prompts=prompts.jsonl --num_samples=4 \
        --temperature=1 --json=samples.json

A single continuation streams to standard output. `--mesh=expert=4` keeps each attention expert, its
keys and values, and its share of the FFN experts on a separate device; data and fsdp split the rows
of a batch, tensor splits heads and columns. A continuation ends at the tokenizer's EOS token, at a
`--stop` text, or after --max_new_tokens.

`--json` writes `checkpoint`, `dtype`, `mesh`, and `rows`, in the order of the prompts:
  prompt, sample: the prompt, and the index of the sample, from 0.
  text, tokens: the continuation without its end; its tokens, those of a `--stop` text included.
  reason: 'end', 'stop' or 'length'.
With `--json=-` nothing else is written to standard output.
"""

import signal
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from bam_jax import cli, config
from bam_jax.errors import UserError
from bam_jax.generate import generator, text
from bam_jax.generate.sampling import SamplingParams
from bam_jax.parallel import sharding

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'A run, a step, or an output of convert.')
_PROMPT = flags.DEFINE_multi_string('prompt', [], 'Text to continue; may be repeated.')
_PROMPTS = flags.DEFINE_string(
  'prompts', None, 'A file: one prompt a line, or .jsonl with `prompt`.'
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  'max_new_tokens', 128, 'Maximum tokens of a continuation.', lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 selects the most probable token.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Sample from the k most probable tokens; 0: all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Sample from the top tokens with this probability mass.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the sampling.')
_SAMPLES = flags.DEFINE_integer('num_samples', 1, 'Continuations of each prompt.', lower_bound=1)
_STOP = flags.DEFINE_multi_string('stop', [], 'Text that ends a continuation; may be repeated.')
_BATCH = flags.DEFINE_integer('batch_size', 8, 'Maximum continuations at once.', lower_bound=1)
_DTYPE = flags.DEFINE_enum(
  'dtype', None, ['float32', 'bfloat16'], 'Default: float32 on CPU, bfloat16 elsewhere.'
)
_MESH = flags.DEFINE_list('mesh', [], 'Devices along each axis: data=2,expert=4.')


def main() -> dict[str, Any]:
  """Continues the prompts that the flags name, and prints the text."""
  if not _CHECKPOINT.value:
    raise UserError('--checkpoint=DIR is required.')
  params = SamplingParams(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
  if _SAMPLES.value > 1 and not params.temperature:
    raise UserError(
      '--num_samples are identical at temperature 0: set --temperature=1, for example.'
    )
  prompts = [*_PROMPT.value, *(text.read_prompts(_PROMPTS.value) if _PROMPTS.value else [])]
  if not prompts:
    raise UserError("--prompt='...' or --prompts=FILE is required.")
  dtype = _DTYPE.value or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
  sizes = cli.parse_mesh(_MESH.value)
  loaded = generator.load(_CHECKPOINT.value, dtype, sharding.make_mesh(sizes))
  for signum in (signal.SIGPIPE, signal.SIGINT):
    signal.signal(signum, signal.SIG_DFL)  # a reader that has seen enough: no traceback
  rows = _continue(loaded, prompts, params)
  mesh = config.to_dict(sizes)
  return {'checkpoint': _CHECKPOINT.value, 'dtype': dtype, 'mesh': mesh, 'rows': rows}


def _continue(
  loaded: generator.Loaded, prompts: Sequence[str], params: SamplingParams
) -> list[dict[str, Any]]:
  """The rows of `--json`; streams a single continuation, prints several at the end."""
  tokenizer, num_samples = loaded.tokenizer, _SAMPLES.value
  ids = text.prompt_tokens(tokenizer, prompts)
  _warn_of_length(loaded, max(map(len, ids)))
  rows = [generator.Row(tokens, i) for tokens in ids for i in range(num_samples)]
  made = [text.Continuation(tokenizer, row.prompt, _STOP.value) for row in rows]
  stream = len(rows) == 1
  if stream:
    _print(prompts[0])

  def watch(number: int, tokens: list[int]) -> bool:
    shown = made[number].add(tokens)
    if stream:
      _print(shown)
    return made[number].stopped

  loaded.generator.generate(
    rows,
    _MAX_NEW_TOKENS.value,
    params,
    seed=_SEED.value,
    batch_size=_BATCH.value,
    every=1 if stream else generator.MAX_STEPS,
    watch=watch,
  )
  facts = []
  for number, (row, one) in enumerate(zip(rows, made)):
    prompt, rest = prompts[number // num_samples], one.finish()
    _print(f'{rest}\n' if stream else f'{_title(prompt, row.sample)}\n{one.text}\n\n')
    reason = 'length' if len(one.tokens) == _MAX_NEW_TOKENS.value else 'end'
    fact = {'prompt': prompt, 'sample': row.sample, 'text': one.text, 'tokens': one.tokens}
    facts.append(fact | {'reason': 'stop' if one.stopped else reason})
  return facts


def _warn_of_length(loaded: generator.Loaded, longest: int) -> None:
  trained = loaded.meta.sequence_length
  if longest + _MAX_NEW_TOKENS.value > trained:
    print(
      f'WARNING: the longest prompt has {longest:,} tokens plus up to {_MAX_NEW_TOKENS.value:,} '
      f'new ones; the model was trained on sequences of {trained:,}, and text beyond that may be '
      'poor.',
      file=sys.stderr,
    )


def _print(words: str) -> None:
  output = sys.stderr if flags.FLAGS.json == '-' else sys.stdout
  output.write(words)
  output.flush()


def _title(prompt: str, sample: int) -> str:
  line = ' '.join(prompt.split())
  line = line if len(line) <= 72 else line[:71] + '…'
  return f'== {line}' + (f' ({sample + 1} of {_SAMPLES.value})' if _SAMPLES.value > 1 else '')


if __name__ == '__main__':
  cli.run(main)
