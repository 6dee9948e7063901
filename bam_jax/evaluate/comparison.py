"""Checkpoints side by side on the same documents: their scores, intervals and differences."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich import markup, progress

from bam_jax import checkpoint, config
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.evaluate import bootstrap, corpus, routing, windows
from bam_jax.evaluate.scorer import Scorer, rows_mesh
from bam_jax.parallel import sharding
from bam_jax.reports import scores

MEASURES = ('nats_per_token', 'perplexity', 'bits_per_byte')


class Options(NamedTuple):
  """How documents are scored, and how sure one can be."""

  dtype: str = 'float32'
  mesh: config.Mesh = config.Mesh()
  batch_size: int = 16
  window: int | None = None  # tokens that are read at once; None: what each was trained at
  stride: int | None = None  # tokens from one window to the next; None: the window's
  resamples: int = 1000
  confidence: float = 0.95
  seed: int = 0  # of the resamples


class Entry(NamedTuple):
  """One checkpoint to compare."""

  path: str
  label: str
  meta: checkpoint.Meta
  tokenizer: Tokenizer
  window: int
  stride: int


class Result(NamedTuple):
  """What one checkpoint scored: by domain, sums of each document, and records of the routers."""

  entry: Entry
  nll: dict[str, np.ndarray]  # float64 nats
  tokens: dict[str, np.ndarray]  # that were scored
  records: dict[str, routing.Record]  # empty unless asked for


def enter(paths: Sequence[str], domains: Sequence[corpus.Domain], options: Options) -> list[Entry]:
  """The checkpoints, all checked before the first is scored.

  Raises:
    UserError: one is not a checkpoint, is given twice, or does not go with the data or the options.
  """
  if not paths:
    raise UserError('--checkpoint=DIR is required; it may be given several times.')
  sharding.make_mesh(rows_mesh(options.mesh))
  folders = [str(checkpoint.find(path)) for path in paths]
  twice = next((p for p, f in zip(paths, folders) if folders.count(f) > 1), None)
  if twice:
    raise UserError(f'--checkpoint={twice} is given twice: name each checkpoint once.')
  metas = [checkpoint.read_meta(path) for path in paths]
  runs = [meta.run for meta in metas]
  entries = []
  for path, meta in zip(paths, metas):
    tokenizer = checkpoint.open_tokenizer(path, meta)
    for domain in domains:
      domain.check(tokenizer, path)
    window = options.window or meta.sequence_length
    stride = options.stride or window
    if stride > window:
      raise UserError(
        f'--stride={stride} is above the window of {window} tokens, and would leave tokens out: '
        'lower it.'
      )
    label = meta.run if runs.count(meta.run) == 1 else path
    entries.append(Entry(path, label, meta, tokenizer, window, stride))
  return entries


def score(
  entry: Entry,
  domains: Sequence[corpus.Domain],
  options: Options,
  routers: bool = False,
  bar: progress.Progress | None = None,
) -> Result:
  """Scores every document under one checkpoint, and records what its `routers` do if asked."""
  scorer = Scorer(entry.path, options.dtype, options.mesh, options.batch_size, entry.window)
  result = Result(entry, {}, {}, {})
  for domain in domains:
    documents = domain.documents(entry.tokenizer)
    pieces, owners = [], []
    for number, tokens in enumerate(documents):
      cut = list(windows.cut(tokens, entry.window, entry.stride))
      pieces += cut
      owners += [number] * len(cut)
    record = routing.Record()
    nll = np.zeros(len(pieces))
    bar = bar or progress.Progress(disable=True)
    task = bar.add_task(markup.escape(f'{entry.label}: {domain.name}'), total=len(pieces))
    for number, scored in scorer.score(pieces, routers, functools.partial(bar.advance, task)):
      # Summed by window first and by document later, in an order that nothing else has a part in.
      nll[number] = scored.nll.sum(dtype=np.float64)
      record.add(owners[number], number, scored.routing)
    nll = np.bincount(owners, weights=nll, minlength=len(documents))
    bad = np.flatnonzero(~np.isfinite(nll))
    if len(bad):
      raise UserError(
        f'{entry.path} gives document {bad[0]} of {domain.name} no finite likelihood: its '
        'parameters are damaged, or its training diverged.'
      )
    result.nll[domain.name] = nll
    result.tokens[domain.name] = np.array([len(tokens) - 1 for tokens in documents])
    if routers:
      result.records[domain.name] = record
    bar.remove_task(task)
  return result


def compare(
  results: Sequence[Result], domains: Sequence[corpus.Domain], options: Options
) -> list[dict[str, Any]]:
  """The rows of `--json`; see `python -m bam_jax.evaluate --help`."""
  # Columns of a domain's sums: bytes, then nats and tokens of each checkpoint.
  sums, drawn = {}, {}
  for domain in domains:
    name = domain.name
    columns = [column for r in results for column in (r.nll[name], r.tokens[name])]
    sums[name] = np.stack([domain.byte_counts, *columns], axis=1).astype(np.float64)
    # A single document says nothing of other documents: no interval.
    drawn[name] = None
    if len(sums[name]) > 1:
      drawn[name] = bootstrap.totals(sums[name], options.resamples, options.seed, name)
  whole = {name: x.sum(0, keepdims=True) for name, x in sums.items()}
  overall_draws = None
  if not any(draws is None for draws in drawn.values()):
    overall_draws = sum(drawn.values())
  rows = []
  for place, result in enumerate(results):
    entry, meta = result.entry, result.entry.meta
    same = entry.tokenizer.hash == results[0].entry.tokenizer.hash
    rest = place, same, options.confidence
    rows.append(
      {
        'label': entry.label,
        'checkpoint': entry.path,
        'run': meta.run,
        'step': meta.step,
        'method': meta.method,
        'tokenizer_hash': meta.tokenizer_hash,
        'window': entry.window,
        'stride': entry.stride,
        'domains': {
          name: {'documents': len(x)} | _score(whole[name], drawn[name], *rest)
          for name, x in sums.items()
        },
        'overall': {'documents': sum(map(len, sums.values()))}
        | _score(sum(whole.values()), overall_draws, *rest),
        'experts': routing.expert_names(meta),
        'routing': _routing(result),
      }
    )
  return rows


def measures(totals: np.ndarray, place: int) -> dict[str, np.ndarray]:
  """Each measure of one checkpoint, given column sums (..., C)."""
  nbytes, nll, tokens = totals[..., 0], totals[..., 1 + 2 * place], totals[..., 2 + 2 * place]
  nats = nll / tokens
  values = nats, np.exp(np.minimum(nats, scores.MAX_NATS)), nll / (math.log(2) * nbytes)
  return dict(zip(MEASURES, values))


def _score(
  totals: np.ndarray, draws: np.ndarray | None, place: int, same: bool, confidence: float
) -> dict[str, Any]:
  """A checkpoint's scores in one column of the table, and their differences to the first's."""

  def facts(value, resampled):
    low, high = (None, None) if draws is None else bootstrap.interval(resampled, confidence)
    return {'value': float(value), 'low': low, 'high': high}

  drawn = totals if draws is None else draws
  values, base = measures(totals[0], place), measures(totals[0], 0)
  values_R, base_R = measures(drawn, place), measures(drawn, 0)
  differences = {
    m: facts(values[m] - base[m], values_R[m] - base_R[m]) if same or m == 'bits_per_byte' else None
    for m in MEASURES
  }
  return {
    'tokens': int(totals[0, 2 + 2 * place]),
    'bytes': int(totals[0, 0]),
    'nll': float(totals[0, 1 + 2 * place]),
    **{m: facts(values[m], values_R[m]) for m in MEASURES},
    'difference': differences if place else None,
  }


def _routing(result: Result) -> dict[str, dict[str, Any]] | None:
  experts = routing.expert_names(result.entry.meta)
  by_router: dict[str, dict[str, Any]] = {}
  for domain, record in result.records.items():
    for router, facts in record.facts(domain, experts).items():
      by_router.setdefault(router, {})[domain] = facts
  return by_router or None


def notes(entries: Sequence[Entry]) -> list[str]:
  """What a reader should know of the numbers, in sentences."""
  found = []
  for entry in entries:
    trained = entry.meta.sequence_length
    if entry.window > trained:
      found.append(
        f'{entry.label} was trained on sequences of {trained:,} tokens and reads {entry.window:,} '
        'at once: its likelihoods past its own length may mean little.'
      )
  if len({entry.tokenizer.hash for entry in entries}) > 1:
    found.append('The tokenizers differ: compare bits per byte, not perplexity.')
  if len({(entry.window, entry.stride) for entry in entries}) > 1:
    found.append('The windows differ: give --window and --stride for one and the same context.')
  return found
