"""Mixes dense checkpoints into a mixture's checkpoint for main, evaluate, generate and inspect.

    python -m bam_jax.convert upcycle --from=runs/mine/seed --from=runs/mine/code \\
      --method=bam_kv_experts --output=mixtures/bam

A source is a run's folder (its newest checkpoint), a step's, or a folder or GGUF file as
`import-hf` reads it; source i becomes expert i. Arrays are streamed, a few matrices at a time. With
bam_kv_experts each expert keeps its source's rope_theta and scaling; --rope=first takes the first
source's for all. Other differences of architecture, differing tokenizers, a repeated source, NaN
and a full disk are errors; --output is complete or absent. A recipe trains the result with
init={'checkpoint': DIR}; docs/options.md explains the options.

With --router_init=centroids or ridge, routers are fitted on text: --router_data=NAME=PATH gives a
domain of each source, by the source's run or in their order, as a prepared dataset that has the
domain, or as text that `prepare` reads. The dense average of the sources (and in sequential blocks
the mixture) then runs on this machine's devices, those of --mesh.

`--json` writes `output`, `seconds` and `meta`: the model, and under `manifest` the sources with
their hashes and what became of every array.
"""

import functools
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

from absl import flags

from bam_jax import cli, config
from bam_jax.config import strict
from bam_jax.convert import fitting, writing
from bam_jax.errors import UserError
from bam_jax.hf import importing
from bam_jax.upcycle import routers, rules
from bam_jax.upcycle.sources import Source

INITS = ('random', 'zero', 'centroids', 'ridge')
ROUTINGS = ('soft', 'top1', 'top2')  # attention_top_k is the index

_FROM = flags.DEFINE_multi_string('from', [], 'A dense checkpoint; repeated, in order.')
_METHOD = flags.DEFINE_enum('method', None, get_args(config.Method), 'How to mix them.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to create.')
_EXPERTS = flags.DEFINE_integer('experts', 0, 'If above the sources: adds copies.')
_ATTENTION = flags.DEFINE_enum('attention_routing', 'soft', ROUTINGS, 'Over attention experts.')
_WEIGHTS = flags.DEFINE_list('weights', [], 'One for each source, with --average=weighted.')
# Keys of a recipe's `init.upcycle` under their own names.
_KEYS = (
  flags.DEFINE_integer('top_k', 1, 'FFN experts for each token.'),
  flags.DEFINE_bool('renormalize', False, 'Divide the k gates by their sum.'),
  flags.DEFINE_float('capacity_factor', 0.0, 'Of the FFN experts; 0 is dropless.'),
  flags.DEFINE_bool('expert_bias', False, "A bias that balances the FFN experts' loads."),
  flags.DEFINE_enum('router_input', 'token', ('token', 'prefix'), "prefix: the document's mean."),
  flags.DEFINE_integer('router_memory', 0, 'Of prefix: reaches back so many tokens; 0: all.', 0),
  flags.DEFINE_enum('router_init', 'random', INITS, 'centroids, ridge: fitted to --router_data.'),
  flags.DEFINE_float('router_scale', 1.0, 'Of random routers: deviation times sqrt(D).'),
  flags.DEFINE_integer('embedding_rank', 0, "Of the sources' own embeddings; at most D/8."),
  flags.DEFINE_enum('average', 'mean', ('mean', 'weighted', 'first'), 'Of arrays without experts.'),
  flags.DEFINE_enum('norms', 'mean', ('mean', 'fold'), "fold: into the source's own experts."),
)
_ROPE = flags.DEFINE_enum('rope', 'own', ('own', 'first'), "Rotary positions; or the first's.")
_UNTIE = flags.DEFINE_bool('untie', False, 'Give tied sources a copy of the table as a head.')
_LENGTH = flags.DEFINE_integer('length', 0, 'Of training texts; default: the shortest.', 0)
_DATA = flags.DEFINE_multi_string('router_data', [], "NAME=PATH: text of a source's domain.")
_TOKENS = flags.DEFINE_integer('router_tokens', routers.FIT_TOKENS, 'Of each, to fit routers.', 1)
_MESH = flags.DEFINE_list('mesh', [], 'Devices along each axis that fit routers: fsdp=4.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'), 'Dtype on disk.')
_SEED = flags.DEFINE_integer('seed', 0, "Seed of the draws; or a recipe's seed.", 0, 2**32 - 1)
_NAME = flags.DEFINE_string('name', '', "A recipe's run, to reproduce its draws.")


def main() -> dict[str, Any]:
  """Mixes the checkpoints that the flags name; returns facts about the mixture."""
  with tempfile.TemporaryDirectory() as folder:
    facts, *_ = mix('router_data', 0, Path(folder))
  return facts


def mix(
  data: str, scored: int, folder: Path
) -> tuple[dict[str, Any], list[Source], list[fitting.Domain]]:
  """The same; and the sources, and the domains that routers were fitted on.

  The domains are given by the flag `data`, and keep up to `scored` documents apart for scores; text
  is prepared in `folder`.
  """
  output, start = _OUTPUT.value, time.monotonic()
  given = _FROM.value and all(_FROM.value) and _METHOD.value and output
  strict.require(given, '--from, --method and --output are required.')
  try:
    weights = tuple(map(float, _WEIGHTS.value))
  except ValueError:
    raise UserError(f'--weights={",".join(_WEIGHTS.value)} is not a list of numbers.') from None
  try:
    upcycle = config.Upcycle(
      sources=tuple(_FROM.value),
      method=_METHOD.value,
      num_experts=_EXPERTS.value,
      attention_top_k=ROUTINGS.index(_ATTENTION.value),
      weights=weights,
      **{flag.name: flag.value for flag in _KEYS},
    )
    for flag in (_DATA, _TOKENS, _MESH):
      unused = f'--{flag.name} has no effect with --router_init={upcycle.router_init}: remove it.'
      strict.require(upcycle.fits_routers or not flag.present, unused)
    sources = [importing.open_any(path) for path in upcycle.sources]
    tied = not _UNTIE.value or any(one.meta.model.tied_embeddings for one in sources)
    strict.require(tied, '--untie has no effect, since no source is tied: remove it.')
    sources = importing.adapt(sources, _ROPE.value == 'first', _UNTIE.value, _LENGTH.value)
    domains, fit = [], None
    if upcycle.fits_routers:
      tokens, seed = _TOKENS.value, _SEED.value
      domains = fitting.read(data, _DATA.value, sources, tokens, scored, folder)
      mesh = cli.parse_mesh(_MESH.value)
      fit = functools.partial(fitting.fit, domains, tokens, mesh, seed)
    how = upcycle, _SEED.value, _NAME.value, _DTYPE.value, cli.command()
    with cli.bytes_bar('Mixing') as progress:
      meta = writing.to_checkpoint(output, sources, *how, progress, fit)
  except UserError as error:
    raise UserError(_by_flags(str(error))) from None
  seconds = time.monotonic() - start
  if warning := rules.warning(meta.model):
    print(warning, file=sys.stderr)
  print(f'{output}: made in {seconds:.1f} s.', file=sys.stderr)
  facts = {'output': output, 'seconds': seconds, 'meta': strict.to_dict(meta)}
  return facts, sources, domains


def _by_flags(message: str) -> str:
  """A message about keys of `init.upcycle`, with the names of the flags."""
  flags_of = {'attention_top_k=': '--attention_routing=top', 'num_experts': '--experts'}
  flags_of |= {f'{name}=': f'--{name}=' for name in ('from', 'weights', *(f.name for f in _KEYS))}
  for key, flag in flags_of.items():
    message = re.sub(rf'(?<![\w-]){key}', flag, message)
  return message
