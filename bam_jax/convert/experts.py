"""Adds an expert to a mixture, drops one, or replaces one.

    python -m bam_jax.convert add-expert --checkpoint=runs/mine/bam --from=runs/mine/medicine \\
      --output=mixtures/bam5
    python -m bam_jax.convert drop-expert --checkpoint=runs/mine/bam --expert=law --output=DIR
    python -m bam_jax.convert replace-expert --checkpoint=runs/mine/bam --expert=law \\
      --from=runs/new/law --output=DIR

A dense model, branched from the same seed, becomes an expert of every layer: a run, a step, or a
folder or GGUF file as `import-hf` reads it. An expert is given by name or number: `inspect` lists
the names as `sources`, in order from 0. All else stays the same bytes, averaged arrays and the
other experts' columns of the routers too, so that dropping undoes adding. A replaced expert leaves
its columns to the new one. Differing architectures, tokenizers, an expert that is there already,
and a mixture of fewer than two experts, or fewer than its routers choose, are errors. Arrays are
streamed; --output is complete or absent.

`--json` writes `output`, `seconds` and `meta`: under `sources` the experts' names, and under
`manifest` what was changed, `grown`: for each expert its number before, and all that came before.
"""

import sys
import time
from typing import Any

from absl import flags

from bam_jax import cli, errors
from bam_jax.config.strict import require, to_dict
from bam_jax.convert import writing
from bam_jax.hf import importing
from bam_jax.upcycle import growth, merge, sources

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'The mixture: a run, step, or output.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to create.')
_FROM = flags.DEFINE_string('from', None, 'The dense model to add, or to replace an expert by.')
_EXPERT = flags.DEFINE_string('expert', None, 'Name or number of the expert to drop or replace.')
_INIT = flags.DEFINE_enum('router_init', 'random', ('random', 'zero'), "An added expert's columns.")
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of random ones.', 0, 2**32 - 1)
USED = {
  'add-expert': ('from', 'router_init', 'seed'),
  'drop-expert': ('expert',),
  'replace-expert': ('expert', 'from'),
}


def main() -> dict[str, Any]:
  """Does what the subcommand's name says; returns facts about the mixture."""
  name, start = errors.subcommand, time.monotonic()
  for flag in (_CHECKPOINT, _OUTPUT, _FROM, _EXPERT):
    needed = flag.name in ('checkpoint', 'output', *USED[name])
    require(flag.value or not needed, f'--{flag.name} is required.')
  for flag in (_FROM, _EXPERT, _INIT, _SEED):
    used = flag.name in USED[name] or not flag.present
    require(used, f'--{flag.name} has no effect on {name}: remove it.')
  mixture = sources.open_checkpoint(_CHECKPOINT.value)
  if name == 'drop-expert':
    changed = growth.drop(mixture, [_EXPERT.value])
  else:
    dense = importing.open_any(_FROM.value)
    if name == 'add-expert':
      changed = growth.add(mixture, dense, merge.run_key(_SEED.value, ''), _INIT.value)
    else:
      changed = growth.replace(mixture, dense, _EXPERT.value)
    growth.check_new(mixture, changed)
  output, how = _OUTPUT.value, (_SEED.value, cli.command())
  with cli.bytes_bar('Writing') as progress:
    meta = writing.copy_to_checkpoint(output, changed, *how, progress)
  seconds, names = time.monotonic() - start, ', '.join(meta.sources)
  print(f'{output}: experts {names}, made in {seconds:.1f} s.', file=sys.stderr)
  return {'output': output, 'seconds': seconds, 'meta': to_dict(meta)}
