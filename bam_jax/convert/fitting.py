"""Text of the sources' domains: some of it to fit a mixture's routers on, the rest to score it."""

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from bam_jax import config
from bam_jax.config.strict import require
from bam_jax.data import mixture, shards
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.evaluate import corpus
from bam_jax.model import arithmetic, transformer
from bam_jax.model.kernels import attention
from bam_jax.parallel import memory, processes, sharding
from bam_jax.prepare import sources as prepare
from bam_jax.upcycle import routers
from bam_jax.upcycle.merge import Merge
from bam_jax.upcycle.sources import Source

SCORED = 0.5  # of the documents of a text without files for validation, by a hash of each
MAX_LENGTH = 2048  # of the sequences that are read at once, where models take longer ones
BATCH_TOKENS = 4096  # read at once, rounded up to a sequence for every part of the mesh


class Encoded:
  """Documents in memory, with what `mixture` reads of a shard's."""

  def __init__(self, documents: Sequence[np.ndarray]):
    self._documents = documents
    self.lengths = np.array([len(tokens) for tokens in documents], np.int64)

  def read(self, index: int, start: int, stop: int) -> np.ndarray:
    """Tokens `start` to `stop` of one document."""
    return self._documents[index][start:stop]


class Domain(NamedTuple):
  """The text of one source's domain."""

  name: str
  fitted: Encoded | shards.Documents  # BOS and EOS included
  scored: corpus.Domain | None  # other documents, if asked for


def read(
  flag: str, given: Sequence[str], opened: Sequence[Source], tokens: int, seed: int, scored: int
) -> list[Domain]:
  """The domain of every source, in their order, from items NAME=PATH of a flag.

  A domain that has a source's run name is that source's, the others belong to the other sources in
  order. PATH is a prepared dataset that has the domain, whose train split is for fitting and whose
  valid split is for scores; or text as `prepare` reads it, split in the same way. Of a text at
  least `tokens` tokens are for fitting, from random documents. Up to `scored` documents are kept
  for scores; with 0 all text without files for validation is for fitting. UserError where a source
  has no domain, a domain too little text, or something cannot be read.
  """
  paths: dict[str, Path] = {}
  for item in given:
    name, _, path = item.partition('=')
    known = path and shards.DOMAIN_NAME.fullmatch(name)
    require(known, f'--{flag}={item} is not NAME=PATH: name the domain of a source.')
    require(name not in paths, f'--{flag}={item}: the domain {name} is given twice.')
    paths[name] = Path(path)
  runs = [source.meta.run for source in opened]
  others = iter([name for name in paths if name not in runs])
  names = [run if run in paths else next(others, '') for run in runs]
  missing = [run for run, name in zip(runs, names) if not name]
  fix = f'give --{flag}=NAME=PATH once for each --from, by its run or in their order.'
  require(not missing, f'--{flag} has no text for the source {", ".join(missing)}: {fix}')
  unread = ', '.join(paths.keys() - set(names))
  require(len(set(names)) == len(paths), f'--{flag}={unread} belongs to no source: {fix}')
  tokenizer, found = opened[0].tokenizer(), []
  for name in names:
    where = f'--{flag}={name}={paths[name]}'
    if (paths[name] / shards.MANIFEST).exists():
      domain = _prepared(name, paths[name], tokenizer, opened[0].path, scored)
    else:
      domain = _text(where, name, paths[name], tokenizer, tokens, seed, scored)
    count = int(domain.fitted.lengths.sum())
    few = f'{where} has {count:,} tokens to fit routers on, below --router_tokens={tokens}'
    require(count >= tokens, f'{few}: give more text, or lower it.')
    found.append(domain)
  return found


def _prepared(name: str, path: Path, tokenizer: Tokenizer, source: str, scored: int) -> Domain:
  dataset = shards.open_dataset(path)
  fitted = dataset.documents(name, prepare.TRAIN)
  corpus.Prepared(name, dataset, prepare.TRAIN, None).check(tokenizer, source)
  held_out = corpus.Prepared(name, dataset, prepare.VALID, scored) if scored else None
  return Domain(name, fitted, held_out)


def _text(
  where: str, name: str, path: Path, tokenizer: Tokenizer, tokens: int, seed: int, scored: int
) -> Domain:
  domain = prepare.Domain.find(name, path, 'text', SCORED if scored else 0.0)
  [domain] = prepare.hold_out([domain])
  texts = {prepare.TRAIN: [], prepare.VALID: []}
  for split, text in domain.read():
    texts[split].append(text)
  fix = 'give more documents, or files named valid*'
  require(texts[prepare.VALID] or not scored, f'{where} leaves no document to score: {fix}.')
  order = np.random.default_rng(seed).permutation(len(texts[prepare.TRAIN])).tolist()
  documents, count = [], 0
  for numbers in itertools.batched(order, 64):
    some = corpus.Text(name, [texts[prepare.TRAIN][number] for number in numbers])
    documents += some.documents(tokenizer)
    count = sum(map(len, documents))
    if count >= tokens:
      break
  held_out = corpus.Text(name, texts[prepare.VALID][:scored]) if scored else None
  return Domain(name, Encoded(documents), held_out)


def fitter(
  domains: Sequence[Domain], tokens: int, sizes: config.Mesh, dtype: str, seed: int
) -> Callable[[Merge, config.Model], Mapping[str, np.ndarray]]:
  """The function that fits a merge's routers on `tokens` tokens of each source's domain."""

  def fit(merge: Merge, model: config.Model) -> Mapping[str, np.ndarray]:
    mesh = sharding.make_mesh(sizes)
    length = min(MAX_LENGTH, *(source.meta.sequence_length for source in merge.sources))
    rows = sizes.batch_shards * max(1, BATCH_TOKENS // (length * sizes.batch_shards))
    attention.check(model, length, jax.default_backend())
    _check_devices(merge, model, sizes)
    batches = []
    for name, documents, _ in domains:
      how = dict(sequence_length=length, batch_size=rows, seed=seed)
      share = processes.share_of_batch(mesh)
      laid = mixture.batches({name: documents}, {name: 1.0}, **how, share=share)
      batches.append([laid[number] for number in range(math.ceil(tokens / (rows * length)))])
    return routers.fit(merge, model, batches, mesh, config.Compute(dtype=dtype))

  return fit


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
