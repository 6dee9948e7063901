"""Text of the sources' domains: some of it to fit a mixture's routers on, the rest to score it."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from bam_jax import config
from bam_jax.config.strict import require
from bam_jax.data import mixture, store
from bam_jax.evaluate import corpus
from bam_jax.model import arithmetic, transformer
from bam_jax.model.kernels import attention
from bam_jax.parallel import memory, processes, sharding
from bam_jax.prepare.dataset import prepare
from bam_jax.upcycle import routers
from bam_jax.upcycle.merge import Merge
from bam_jax.upcycle.sources import Source

SCORED = 0.5  # of the documents of a text without files for validation, by a hash of each
MAX_LENGTH = 2048  # of the sequences that are read at once, where models take longer ones
BATCH_TOKENS = 4096  # read at once, rounded up to a sequence for every part of the mesh


class Domain(NamedTuple):
  """The text of one source's domain, as tokens."""

  name: str
  fitted: store.Documents
  scored: corpus.Prepared | None  # other documents, if asked for


def read(
  flag: str, items: Sequence[str], opened: Sequence[Source], tokens: int, scored: int, folder: Path
) -> list[Domain]:
  """The domain of every source, in their order, from items NAME=PATH of a flag.

  A domain that has a source's run name is that source's, the others belong to the other sources in
  order. PATH is a prepared dataset that has the domain, whose train split is for fitting and
  whose valid split is for scores; or text, which is prepared in `folder`. Up to `scored` documents
  are for scores; with 0 all text without files for validation is for fitting. UserError where a
  source has no domain, a domain fewer than `tokens` for fitting, or something cannot be read.
  """
  given: dict[str, Path] = {}
  for item in items:
    name, _, path = item.partition('=')
    known = path and store.DOMAIN_NAME.fullmatch(name) and name not in given
    require(known, f'--{flag}={item} is not NAME=PATH with another domain for each source.')
    given[name] = Path(path)
  runs = [source.meta.run for source in opened]
  others = iter([name for name in given if name not in runs])
  names = [run if run in given else next(others, '') for run in runs]
  missing = ', '.join(run for run, name in zip(runs, names) if not name)
  fix = f'give --{flag}=NAME=PATH once for each --from, by its run or in their order.'
  require(not missing, f'--{flag} has no text for the source {missing}: {fix}')
  unread = ', '.join(given.keys() - set(names))
  require(len(set(names)) == len(given), f'--{flag}={unread} belongs to no source: {fix}')
  tokenizer, found = opened[0].tokenizer(), []
  texts = {name: path for name, path in given.items() if not (path / store.MANIFEST).exists()}
  if texts:
    held_out = SCORED if scored else 0.0
    prepare(texts, folder / 'text', tokenizer=tokenizer, valid_fraction=held_out, min_decoded=0.0)
  for name in names:
    dataset = store.open_dataset(folder / 'text' if name in texts else given[name])
    fitted = dataset.documents(name, 'train')
    corpus.Prepared(name, dataset, 'train', None).check(tokenizer, opened[0].path)
    few = f'{given[name]} has {fitted.num_tokens:,} tokens of {name} to fit routers on'
    fix = f'give more text than --router_tokens={tokens}, or lower it.'
    require(fitted.num_tokens >= tokens, f'{few}: {fix}')
    apart = corpus.Prepared(name, dataset, 'valid', scored) if scored else None
    found.append(Domain(name, fitted, apart))
  return found


def fit(
  domains: Sequence[Domain],
  tokens: int,
  sizes: config.Mesh,
  seed: int,
  merge: Merge,
  model: config.Model,
) -> dict[str, np.ndarray]:
  """The routers by path of the mixture `model`, fitted on `tokens` tokens of each domain."""
  mesh = sharding.make_mesh(sizes)
  length = min(MAX_LENGTH, *(source.meta.sequence_length for source in merge.sources))
  rows = sizes.batch_shards * max(1, BATCH_TOKENS // (length * sizes.batch_shards))
  attention.check(model, length, jax.default_backend())
  _check_devices(merge, model, sizes)
  share, count = processes.share_of_batch(mesh), math.ceil(tokens / (rows * length))
  how = dict(sequence_length=length, batch_size=rows, seed=seed, share=share)
  laid = [mixture.batches({name: texts}, {name: 1.0}, **how) for name, texts, _ in domains]
  batches = [[of_domain[number] for number in range(count)] for of_domain in laid]
  return routers.fit(merge, model, batches, mesh, config.Compute(dtype=dtype()))


def dtype() -> str:
  """Of activations, where models run."""
  return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'


def _check_devices(merge: Merge, model: config.Model, sizes: config.Mesh) -> None:
  """Says how much memory the devices need; UserError if it is not there, or the mesh unfit."""
  largest = model if routers.reads_mixture(model) else model.dense()
  abstract = transformer.Network(largest, config.Compute()).abstract()
  sharding.check_divides(abstract, config.to_dict(sizes), '--mesh', sharding.spec_of)
  # The fake devices of a CPU share its memory.
  parts = 1 if jax.default_backend() == 'cpu' else sizes.size // sizes.data
  width = model.d_model if merge.upcycle.router_init == 'ridge' else 0
  sums = 2 * model.num_layers * model.d_model * (1 + width)
  needed = 4 * (arithmetic.parameters(largest).total // parts + sums)
  what = f'Fitting routers needs about {needed / 1e9:,.2f} GB of memory a device'
  free = memory.free_bytes()
  fix = 'use a larger --mesh, or --router_init=random.'
  require(free is None or needed <= free, f'{what}, and {(free or 0) / 1e9:,.2f} are free: {fix}')
  print(f'{what}.', file=sys.stderr)
