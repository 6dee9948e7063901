"""Generates continuations of prompts with any checkpoint: dense, average or mixture.

    python -m bam_jax.generate --checkpoint=runs/quickstart/bam_kv --prompt='The court '
    python -m bam_jax.generate --checkpoint=DIR --prompt='def f(x):' --temperature=0.8 --top_p=0.95
    python -m bam_jax.generate --checkpoint=DIR --prompts=prompts.jsonl --num_samples=4 \
        --temperature=1 --json=samples.json

A single continuation streams to standard output, and ends at the tokenizer's EOS token, at a
`--stop` text, or after --max_new_tokens. `--mesh=expert=4` puts each attention expert, its keys and
values on a device of its own; data and fsdp split the rows of a batch.

`--json` writes `checkpoint`, `dtype`, `mesh`, and `rows`, in the order of the prompts:
  prompt, sample: the prompt, and the index of the sample, from 0.
  text, tokens: the continuation without its end; its tokens, those of a `--stop` text included.
  reason: 'end', 'stop' or 'length'.
With `--json=-` nothing else is written to standard output.
"""

import functools
import itertools
import sys
import textwrap
from typing import Any

import jax
from absl import flags

from bam_jax import cli, config
from bam_jax.config.strict import require
from bam_jax.generate import generator, text
from bam_jax.generate.sampling import SamplingParams
from bam_jax.parallel import sharding
from bam_jax.upcycle import growth

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'A run, a step, or an output of convert.')
_PROMPT = flags.DEFINE_multi_string('prompt', [], 'Text to continue; may be repeated.')
_PROMPTS = flags.DEFINE_string('prompts', None, '.txt, one prompt a line; or .jsonl with `prompt`.')
_MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 128, 'Maximum of a continuation.', 1)
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 selects the most probable token.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Sample from the k most probable tokens; 0: all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Sample from the top tokens with this probability mass.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the sampling.')
_SAMPLES = flags.DEFINE_integer('num_samples', 1, 'Continuations of each prompt.', lower_bound=1)
_STOP = flags.DEFINE_multi_string('stop', [], 'Text that ends a continuation; may be repeated.')
_BATCH = flags.DEFINE_integer('batch_size', 8, 'Maximum continuations at once.', lower_bound=1)
_DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Default: float32 only on CPU.')
_WITHOUT = flags.DEFINE_list('without', [], 'Experts to leave out, by name or number.')
_MESH = flags.DEFINE_list('mesh', [], 'Devices along each axis: data=2,expert=4.')


def main() -> dict[str, Any]:
  """Continues the prompts that the flags name: streams a single one, prints several at the end."""
  require(_CHECKPOINT.value, '--checkpoint=DIR is required.')
  params = SamplingParams(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
  drawn = _SAMPLES.value == 1 or params.temperature
  require(drawn, '--num_samples are identical at temperature 0: set --temperature=1, for example.')
  prompts = [*_PROMPT.value, *(text.read_prompts(_PROMPTS.value) if _PROMPTS.value else [])]
  require(prompts, "--prompt='...' or --prompts=FILE is required.")
  dtype = _DTYPE.value or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
  path, sizes = _CHECKPOINT.value, cli.parse_mesh(_MESH.value)
  source = growth.open_without(path, _WITHOUT.value)
  meta, tokenizer = source.meta, source.tokenizer()
  model = generator.load(source, dtype, sharding.make_mesh(sizes))
  max_new_tokens = _MAX_NEW_TOKENS.value
  ids = [[tokenizer.bos_id, *tokens] for tokens in tokenizer.encode_batch(prompts)]
  longest, trained = max(map(len, ids)), meta.sequence_length
  if longest + max_new_tokens > trained:
    given = f'WARNING: the longest prompt has {longest:,} tokens plus up to {max_new_tokens:,} new'
    beyond = f'ones; the model was trained on sequences of {trained:,}, text beyond may be poor.'
    print(given, beyond, file=sys.stderr)
  samples = range(_SAMPLES.value)
  rows = [generator.Row(tokens, sample) for tokens in ids for sample in samples]
  file = sys.stderr if flags.FLAGS.json == '-' else sys.stdout
  show = functools.partial(print, end='', file=file, flush=True)
  stream = len(rows) == 1
  if stream:
    show(prompts[0])
  shown = [show] if stream else []
  made = [text.Continuation(tokenizer, row.prompt, _STOP.value, *shown) for row in rows]
  every = 1 if stream else generator.MAX_STEPS
  how = dict(seed=_SEED.value, batch_size=_BATCH.value, every=every)
  watch = lambda row, tokens: made[row].add(tokens)
  model.generate(rows, max_new_tokens, params, watch=watch, **how)
  facts = []
  for (prompt, sample), one in zip(itertools.product(prompts, samples), made):
    one.finish()
    if stream:
      show('\n')
    else:
      line = textwrap.shorten(prompt, 72, placeholder='…')
      count = f' ({sample + 1} of {len(samples)})' if len(samples) > 1 else ''
      show(f'== {line}{count}\n{one.text}\n\n')
    reason = 'stop' if one.stopped else 'length' if len(one.tokens) == max_new_tokens else 'end'
    facts.append(
      dict(prompt=prompt, sample=sample, text=one.text, tokens=one.tokens, reason=reason)
    )
  return {'checkpoint': path, 'dtype': dtype, 'mesh': config.to_dict(sizes), 'rows': facts}


if __name__ == '__main__':
  cli.run(main)
