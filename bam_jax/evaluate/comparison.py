"""Checkpoints side by side on the same documents: their scores, intervals and differences.

Confidence intervals are by the bootstrap over documents, since the tokens of one are not
independent; Efron and Tibshirani, 1993, chapter 13. All checkpoints are judged on the same draws.

Legend: N documents, R resamples, C sums: bytes, then nats and tokens of each checkpoint.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import markup, progress

from bam_jax import checkpoint, cli, config
from bam_jax.config.strict import require
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.evaluate import corpus, routing
from bam_jax.evaluate.scorer import Scorer, cut, rows_mesh
from bam_jax.parallel import sharding
from bam_jax.reports import scores
from bam_jax.upcycle import growth
from bam_jax.upcycle.sources import Source


class Options(NamedTuple):
  """How checkpoints are evaluated: on documents, or in tasks."""

  dtype: str = 'float32'
  mesh: config.Mesh = config.Mesh()
  window: int | None = None  # tokens that are read at once; None: what each was trained at
  seed: int = 0  # of the resamples, or of sampling
  max_documents: int | None = None  # of a domain or task; None: all
  without: Sequence[str] = ()  # experts that are left out of mixtures, by name or number
  # Of documents.
  stride: int | None = None  # tokens from one window to the next; None: the window's
  resamples: int = 1000
  confidence: float = 0.95
  # Of tasks.
  batch_size: int = 16  # texts that are generated at once
  few_shot: int | None = None  # examples before each question; None: as each task says


@dataclasses.dataclass
class Entry:
  """One checkpoint, and what it scored by domain."""

  source: Source
  label: str
  tokenizer: Tokenizer
  window: int
  stride: int
  nll: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # float64 (N,), nats
  tokens: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # (N,), scored ones
  records: dict[str, routing.Record] = dataclasses.field(default_factory=dict)  # if asked for


def identity(meta: checkpoint.Meta) -> dict[str, Any]:
  """Which checkpoint it is, as in `--json`."""
  return {key: getattr(meta, key) for key in ('run', 'step', 'method', 'tokenizer_hash')}


def open_checkpoints(paths: Sequence[str], options: Options) -> list[Source]:
  """The checkpoints, not read yet; UserError for one that is given twice, or lacks devices."""
  require(paths, '--checkpoint=DIR is required; it may be repeated.')
  sharding.make_mesh(rows_mesh(options.mesh))
  for path in paths:
    foreign = any(Path(path).glob('*.safetensors'))
    fix = f'run python -m bam_jax.convert import-hf --input={path} --output=DIR first.'
    require(not foreign, f'--checkpoint={path} is a folder of transformers: {fix}')
  folders = [str(checkpoint.find(path)) for path in paths]
  for path, folder in zip(paths, folders):
    twice = f'--checkpoint={path} is given twice: name each checkpoint once.'
    require(folders.count(folder) == 1, twice)
  return [growth.open_without(path, options.without) for path in paths]


def enter(paths: Sequence[str], domains: Sequence[corpus.Domain], options: Options) -> list[Entry]:
  """The checkpoints; UserError for one that does not go with the data or the options."""
  opened, entries = open_checkpoints(paths, options), []
  runs = [source.meta.run for source in opened]
  for source in opened:
    (path, _, meta, *_), tokenizer = source, source.tokenizer()
    for domain in domains:
      domain.check(tokenizer, path)
    window = options.window or meta.sequence_length
    stride = options.stride or window
    wrong = f'--{stride=} is above the window of {window} tokens and would skip tokens: lower it.'
    require(stride <= window, wrong)
    label = meta.run if runs.count(meta.run) == 1 else path
    entries.append(Entry(source, label, tokenizer, window, stride))
  return entries


def score(
  entry: Entry, domains: Sequence[corpus.Domain], options: Options, routers: bool = False
) -> None:
  """Scores every document under one checkpoint, and records what its `routers` do if asked."""
  scorer = Scorer(entry.source, options.dtype, options.mesh, entry.window)
  console = cli.console()
  bar = dict(console=console, transient=True, disable=not console.is_terminal)
  for domain in domains:
    documents = domain.documents(entry.tokenizer)
    pieces, owners = [], []
    for number, tokens in enumerate(documents):
      windows = list(cut(tokens, entry.window, entry.stride))
      pieces += windows
      owners += [number] * len(windows)
    record, nll = routing.Record(), np.zeros(len(pieces))
    what, found = markup.escape(f'{entry.label}: {domain.name}'), scorer.score(pieces, routers)
    for number, scored in progress.track(found, what, len(pieces), **bar):
      # Summed by window first and by document later, in an order that nothing else has a part in.
      nll[number] = scored.nll.sum(dtype=np.float64)
      record.add(scored.routing)
    nll = np.bincount(owners, weights=nll, minlength=len(documents))
    for bad in np.flatnonzero(~np.isfinite(nll)):
      wrong = f'{entry.source.path} has no finite likelihood for document {bad} of {domain.name}'
      raise UserError(f'{wrong}: its parameters are damaged, or its training diverged.')
    entry.nll[domain.name] = nll
    entry.tokens[domain.name] = np.array([len(tokens) - 1 for tokens in documents])
    if routers:
      entry.records[domain.name] = record


def compare(
  entries: Sequence[Entry], domains: Sequence[corpus.Domain], options: Options
) -> list[dict[str, Any]]:
  """The rows of `--json`, of entries that were scored."""
  documents, sums = {}, {}  # by domain; the sums over its documents, and those of each resample
  for domain in domains:
    name = domain.name
    columns = [column for e in entries for column in (e.nll[name], e.tokens[name])]
    each_NC = np.stack([domain.byte_counts, *columns], axis=1).astype(np.float64)
    documents[name], sums[name] = len(each_NC), each_NC.sum(0, keepdims=True)
    if len(each_NC) > 1:  # a single document says nothing of others: no interval
      drawn_RC = resampled(each_NC, options.resamples, options.seed, name)
      sums[name] = np.concatenate([sums[name], drawn_RC])
  known = min(map(len, sums.values()))
  overall = sum(x[:known] for x in sums.values())
  rows = []
  for place, entry in enumerate(entries):
    same = not entries[0].tokenizer.difference(entry.tokenizer)
    facts = functools.partial(_facts, place=place, same=same, confidence=options.confidence)
    experts = routing.expert_names(entry.source.meta)
    records = {name: record.facts(name, experts) for name, record in entry.records.items()}
    by_router = {r: {name: x[r] for name, x in records.items()} for r in experts if records}
    rows.append(
      {
        'label': entry.label,
        'checkpoint': entry.source.path,
        **identity(entry.source.meta),
        'window': entry.window,
        'stride': entry.stride,
        'domains': {name: facts(documents[name], x) for name, x in sums.items()},
        'overall': facts(sum(documents.values()), overall),
        'experts': experts,
        'routing': by_router or None,
      }
    )
  return rows


def resampled(sums_NC: np.ndarray, resamples: int, seed: int, name: str) -> np.ndarray:
  """Column sums over the documents of each resample, float64 (R, C).

  The draws of a domain depend on the seed and its name, not on what other domains there are.
  """
  rng, size = np.random.default_rng([seed, *name.encode()]), len(sums_NC)
  draws = (rng.integers(size, size=size) for _ in range(resamples))
  counts = (np.bincount(chosen, minlength=size).astype(np.float64) for chosen in draws)
  return np.stack([count_N @ sums_NC for count_N in counts])


def _facts(
  documents: int, sums_RC: np.ndarray, place: int, same: bool, confidence: float
) -> dict[str, Any]:
  """A checkpoint's scores in one column of the table, and their differences to the first's.

  Row 0 of the sums is that of the documents, others are resamples.
  """

  def measure(values_R: np.ndarray) -> dict[str, float | None]:
    tails = [(1 - confidence) / 2, 1 - (1 - confidence) / 2]
    low, high = np.quantile(values_R[1:], tails).tolist() if len(values_R) > 1 else (None, None)
    return {'value': float(values_R[0]), 'low': low, 'high': high}

  here, first = _measures(sums_RC, place), _measures(sums_RC, 0)
  difference = {name: measure(here[name] - first[name]) for name in here}
  if not same:
    difference |= {'nats_per_token': None, 'perplexity': None}
  return {
    'documents': documents,
    'tokens': int(sums_RC[0, 2 + 2 * place]),
    'bytes': int(sums_RC[0, 0]),
    'nll': float(sums_RC[0, 1 + 2 * place]),
    **{name: measure(values) for name, values in here.items()},
    'difference': difference if place else None,
  }


def _measures(sums_RC: np.ndarray, place: int) -> dict[str, np.ndarray]:
  """Each measure of one checkpoint, (R,)."""
  num_bytes, nll, tokens = sums_RC[:, [0, 1 + 2 * place, 2 + 2 * place]].T
  return {
    'nats_per_token': nll / tokens,
    'perplexity': np.exp(np.minimum(nll / tokens, scores.MAX_NATS)),
    'bits_per_byte': nll / (math.log(2) * num_bytes),
  }


def notes(entries: Sequence[Entry]) -> list[str]:
  """What a reader should know of the numbers, in sentences."""
  found = [
    f'{entry.label} was trained on sequences of {entry.source.meta.sequence_length:,} tokens and '
    f'reads {entry.window:,} at once: likelihoods beyond the trained length may be unreliable.'
    for entry in entries
    if entry.window > entry.source.meta.sequence_length
  ]
  if any(entries[0].tokenizer.difference(entry.tokenizer) for entry in entries):
    found.append('The tokenizers differ: compare bits per byte, not perplexity.')
  if len({(entry.window, entry.stride) for entry in entries}) > 1:
    found.append('The windows differ: set --window and --stride to compare equal contexts.')
  return found
