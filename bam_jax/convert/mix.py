"""Mixes dense models into a mixture that is ready to use, without training, and scores it.

    python -m bam_jax.convert mix --from=runs/mine/seed --from=runs/mine/code --from=hub/law \\
      --data=general=general.jsonl --data=code=runs/mine/data --data=law=acts/ --output=mixtures/bam

It is `upcycle` with routers fitted on a little text, and other defaults: attention experts with
keys of their own, one expert a token with a gate of 1, chosen by the mean of the document so far.
--data=NAME=PATH gives a domain of each source, by the source's run or in their order. PATH is a
prepared dataset that has the domain: routers are fitted on its train split and scores are of its
valid split; or it is text that `prepare` reads, JSON lines, Parquet or text files: if none is named
valid, half of the documents, by a hash, are for scores. Text that routers were fitted on is never
scored.

Prints perplexities on every domain's text, of the mixture and beside them those of the domain's
source. `--json` writes what `upcycle` writes, and
  average: `mixture`, `source`: the means of the perplexities.
  domains: a list with `domain`, `source` (its run), and `scores`: `mixture` and `source`, each with
    `documents`, `tokens`, `perplexity`, `bits_per_byte` and so on, as `evaluate` writes them;
    `difference` is from the source.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from bam_jax import cli
from bam_jax.config.strict import require
from bam_jax.convert import fitting, upcycle
from bam_jax.evaluate import comparison
from bam_jax.reports import scores
from bam_jax.upcycle import sources

DEFAULTS = dict(
  method='bam_kv_experts',
  attention_routing='top1',
  renormalize=True,
  router_input='prefix',
  router_memory=16,
  router_init='ridge',
  router_scale=8.0,  # of no effect on gates of 1; soft ones would be too even with 1
)

_MAX_DOCUMENTS = flags.DEFINE_integer('max_documents', 1000, 'To score of each domain.', 1)
flags.DEFINE_alias('data', 'router_data')
flags.adopt_module_key_flags(upcycle)
for name, value in DEFAULTS.items():
  flags.FLAGS.set_default(name, value)


def main() -> dict[str, Any]:
  """Mixes the models that the flags name and scores the mixture; returns facts about both."""
  method, init = flags.FLAGS['method'].value, flags.FLAGS['router_init'].value
  wrong = f'--method={method} and --router_init={init} make no mixture with fitted routers'
  fits = method not in ('average', 'sparse') and init in ('centroids', 'ridge')
  require(fits, f'{wrong}: run convert upcycle and evaluate.')
  if method == 'btx':  # which has no attention experts
    flags.FLAGS.set_default('attention_routing', 'soft')
  if flags.FLAGS['router_input'].value == 'token':
    flags.FLAGS.set_default('router_memory', 0)
  mesh = cli.parse_mesh(flags.FLAGS['mesh'].value)
  options = comparison.Options(dtype=fitting.dtype(), mesh=mesh)
  with tempfile.TemporaryDirectory() as folder:
    facts, opened, domains = upcycle.mix('data', _MAX_DOCUMENTS.value, Path(folder))
    rows = score(sources.open_checkpoint(facts['output']), opened, domains, options)
  keys = 'mixture', 'source'
  values = [[row['scores'][key]['perplexity']['value'] for key in keys] for row in rows]
  mean = np.mean(values, axis=0).tolist()
  sizes = [[row['scores']['mixture'][key] for key in ('documents', 'tokens')] for row in rows]
  lines = [
    [row['domain'], row['source'], *size, *map(scores.number, pair), f'{pair[0] / pair[1]:.3f}']
    for row, size, pair in zip(rows, sizes, values)
  ]
  lines.append(['average', *[''] * 3, *map(scores.number, mean), f'{mean[0] / mean[1]:.3f}'])
  columns = 'documents', 'tokens', 'mixture', 'source', 'ratio'
  title = 'Perplexity on text that routers were not fitted on'
  cli.console().print(cli.table(title, ['domain', 'its source'], columns, lines))
  return facts | {'domains': rows, 'average': dict(zip(keys, mean))}


def score(
  mixture: sources.Source,
  opened: Sequence[sources.Source],
  domains: Sequence[fitting.Domain],
  options: comparison.Options,
) -> list[dict[str, Any]]:
  """The scores of the mixture on every domain, and of the domain's source."""
  window = min(fitting.MAX_LENGTH, mixture.meta.sequence_length)
  how = mixture.tokenizer(), window, window
  entry = lambda source: comparison.Entry(source, source.meta.run, *how)
  texts, mixed, rows = [domain.scored for domain in domains], entry(mixture), []
  comparison.score(mixed, texts, options)
  for source, text in zip(opened, texts):
    alone = entry(source)
    comparison.score(alone, [text], options)
    found = comparison.compare([alone, mixed], [text], options)
    of = {key: row['domains'][text.name] for key, row in zip(('source', 'mixture'), found)}
    rows.append({'domain': text.name, 'source': source.meta.run, 'scores': of})
  return rows
