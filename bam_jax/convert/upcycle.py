"""Dense checkpoints to a mixture's: a folder that main, evaluate, generate and inspect take.

    python -m bam_jax.convert upcycle --from=runs/mine/seed --from=runs/mine/code \\
      --method=bam_kv_experts --output=mixtures/bam

A source is a run's folder (its newest checkpoint) or a step's; its number is its expert's. Arrays
stream through memory, a few matrices at a time. Whatever does not fit is refused: sources of
another architecture or tokenizer, the same one twice, NaN, a full disk; --output is complete then
or not there. A recipe trains the result with init={'checkpoint': DIR}. docs/options.md has the
options beyond the paper.

`--json` writes `output`, `seconds` and `meta`: the model, and under `manifest` the sources with
their hashes and what became of every array.
"""

import re
import sys
import time
from typing import Any, get_args

from absl import flags

from bam_jax import cli, config
from bam_jax.config import strict
from bam_jax.errors import UserError
from bam_jax.upcycle import outputs, sources

_FROM = flags.DEFINE_multi_string('from', [], 'A dense checkpoint; once for each, in order.')
_METHOD = flags.DEFINE_enum('method', None, get_args(config.Method), 'How to mix them.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to make.')
_EXPERTS = flags.DEFINE_integer('experts', 0, 'More than the sources: copies of the first.')
_ATTENTION = flags.DEFINE_enum(
  'attention_routing', 'soft', ('soft', 'top1', 'top2'), 'Attention experts that a token visits.'
)
_WEIGHTS = flags.DEFINE_list('weights', [], 'One for each source, for --average=weighted.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', sources.DTYPES, 'Of the arrays on disk.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of what is drawn.', 0, 2**32 - 1)
_NAME = flags.DEFINE_string(
  'name', '', "Of the run; with a recipe's seed and run name, what is drawn is the recipe's."
)
# Keys of a recipe's `init.upcycle` under their own names.
_KEYS = (
  flags.DEFINE_integer('top_k', 1, 'FFN experts that a token visits.'),
  flags.DEFINE_bool('renormalize', False, 'Divide the k gates by their sum.'),
  flags.DEFINE_float('capacity_factor', 0.0, 'Of the FFN experts; 0 is dropless.'),
  flags.DEFINE_bool('expert_bias', False, "A bias that evens the FFN experts' loads."),
  flags.DEFINE_enum(
    'router_init', 'random', ('random', 'zero', 'centroids'), 'Centroids take data: use a recipe.'
  ),
  flags.DEFINE_float('router_scale', 1.0, 'Deviation of random routers over 1 / sqrt(D).'),
  flags.DEFINE_enum(
    'average', 'mean', ('mean', 'weighted', 'first'), 'What becomes of arrays without experts.'
  ),
  flags.DEFINE_float('drop_ratio', 0.0, 'Of the hidden dimensions of copies, drawn anew.'),
  flags.DEFINE_float('noise', 0.0, 'Added to copies, in deviations of each array.'),
)


def main() -> dict[str, Any]:
  """Mixes what the flags name, and prints what came out."""
  if not (_FROM.value and all(_FROM.value) and _METHOD.value and _OUTPUT.value):
    raise UserError('From what, how and where to? Give --from, --method and --output.')
  try:
    weights = tuple(float(weight) for weight in _WEIGHTS.value)
  except ValueError:
    raise UserError(f'--weights={",".join(_WEIGHTS.value)} is no list of numbers.') from None
  start = time.monotonic()
  try:
    upcycle = config.Upcycle(
      sources=tuple(_FROM.value),
      method=_METHOD.value,
      num_experts=_EXPERTS.value,
      attention_top_k=('soft', 'top1', 'top2').index(_ATTENTION.value),
      weights=weights,
      **{flag.name: flag.value for flag in _KEYS},
    )
    with cli.bytes_bar('Mixing') as progress:
      meta = outputs.to_checkpoint(
        _OUTPUT.value,
        upcycle,
        seed=_SEED.value,
        name=_NAME.value,
        dtype=_DTYPE.value,
        command=cli.command(),
        progress=progress,
      )
  except UserError as error:
    raise UserError(_by_flags(str(error))) from None
  seconds = time.monotonic() - start
  look = f'python -m bam_jax.convert inspect {_OUTPUT.value}'
  print(f'Made in {seconds:.1f} s; to look at it: {look}', file=sys.stderr)
  return {'output': _OUTPUT.value, 'seconds': seconds, 'meta': strict.to_dict(meta)}


def _by_flags(message: str) -> str:
  """A message about keys of `init.upcycle`, about the flags that they are here."""
  message = re.sub(r'\battention_top_k=(\d)', r'--attention_routing=top\1', message)
  message = re.sub(r'\bnum_experts\b', '--experts', message)
  names = ['from', 'weights', *(flag.name for flag in _KEYS)]
  return re.sub(rf'(?<!-)\b({"|".join(names)})=', r'--\1=', message)
