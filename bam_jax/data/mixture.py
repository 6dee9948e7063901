"""Batches from weighted domains: batch `n` is a pure function of the seed and `n`.

A run resumes at any step, on any number of hosts, with the very batches that it would have seen.
The documents of a domain are packed into sequences of one length, hence a domain's share of the
sequences is its share of the tokens.

Legend: B batch, T sequence.
"""

import math
from collections.abc import Iterator, Mapping

import grain
import numpy as np

from bam_jax.config.strict import require
from bam_jax.data.shards import Documents

Batch = dict[str, np.ndarray]


class PackedSequences(grain.sources.RandomAccessDataSource):
  """One domain's documents, laid end to end and cut into sequences of length T.

  The concatenation is virtual: only the documents' offsets are held. A window is T + 1 tokens and
  the next one starts T later, so that a window's last target is the next one's first input and
  every (input, next token) pair of the corpus is in exactly one window.

  Item `i` is a dict of arrays of length T:
    tokens: int32, the inputs.
    targets: int32, the token after each input.
    segments: int32, 1, 2, ... by document in order of appearance; 0 is padding, which only the
      tail of the last item has.
    positions: int32, counted from 0 at the start of each document's piece in the window.
    weights: float32, 1 where input and target lie in the same document, else 0.

  `seed` shuffles the documents, each `[BOS] + tokens + [EOS]`; None keeps them in order.
  """

  def __init__(self, documents: Documents, sequence_length: int, seed: int | None):
    order = np.arange(len(documents.lengths))
    self._documents = documents
    self._sequence_length = sequence_length
    self._order = order if seed is None else np.random.default_rng(seed).permutation(order)
    self._bounds = np.concatenate([[0], np.cumsum(documents.lengths[self._order], dtype=np.int64)])

  def __len__(self) -> int:
    return math.ceil(max(int(self._bounds[-1]) - 1, 0) / self._sequence_length)

  def __getitem__(self, record_key: int) -> Batch:
    start = record_key * self._sequence_length
    stop = min(start + self._sequence_length + 1, int(self._bounds[-1]))
    first, last = np.searchsorted(self._bounds, (start, stop - 1), side='right') - 1
    cuts = np.clip(self._bounds[first : last + 2], start, stop)
    sizes = np.diff(cuts)  # of each document's piece in the window
    skipped = cuts[:-1] - self._bounds[first : last + 1]  # tokens of it before the window

    tokens, segments, positions = np.zeros((3, self._sequence_length + 1), np.int32)
    segments[: stop - start] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    positions[: stop - start] = np.arange(stop - start) - np.repeat(cuts[:-1] - start, sizes)
    filled = 0
    for i, skip, size in zip(self._order[first : last + 1], skipped.tolist(), sizes.tolist()):
      tokens[filled : filled + size] = self._documents.read(int(i), skip, skip + size)
      filled += size
    same_document = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
    return {
      'tokens': tokens[:-1],
      'targets': tokens[1:],
      'segments': segments[:-1],
      'positions': positions[:-1],
      'weights': same_document.astype(np.float32),
    }


def batches(
  documents: Mapping[str, Documents],
  weights: Mapping[str, float],
  *,
  sequence_length: int,
  batch_size: int,
  seed: int,
  share: tuple[int, int] = (0, 1),
) -> grain.MapDataset[Batch]:
  """The endless training batches of a mixture of domains, by step.

  Each domain repeats for ever and is shuffled anew in every epoch. The shares are kept by
  counting, not by chance: over any stretch a domain is never more than a few sequences off, with
  weights rounded to a hundredth of the smallest one.

  Args:
    weights: the positive share of the tokens of each domain, in any unit.
    batch_size: B, over all processes; a multiple of their number.
    seed: a domain's order depends on it and on the domain's name alone.
    share: which part of every batch this process reads, and how many parts there are.

  Returns:
    A random-access dataset. Its item `n` is this process's part of the batch of step `n`: the
    arrays of `PackedSequences`, [B / parts, T]. The parts, joined in their order, are the same
    batch whatever their number.
  """
  sequences = []
  for name in sorted(weights):
    seeds = np.random.SeedSequence([seed, *name.encode()]).generate_state(2)
    document_seed, sequence_seed = seeds.tolist()
    packed = PackedSequences(documents[name], sequence_length, document_seed)
    require(len(packed), f'The domain {name!r} has no text to train on: prepare it again.')
    sequences.append(grain.MapDataset.source(packed).shuffle(sequence_seed).repeat())

  # Grain scales the smallest weight to 100 and truncates the others: round them before it does.
  shares = [round(100 * weights[name] / min(weights.values())) for name in sorted(weights)]
  mixed = grain.MapDataset.mix(sequences, shares)
  # Sliced after batching, a process holds consecutive rows of each global batch; it reads no more
  # than those, because items are made only when asked for.
  part, parts = share
  return mixed.batch(batch_size // parts, drop_remainder=True)[part::parts]


def iterate(batches: grain.MapDataset[Batch], prefetch: int) -> grain.DatasetIterator[Batch]:
  """Iterates over batches, with `prefetch` of them made ahead in a thread (0: none).

  `get_state()` and `set_state()` of the iterator resume exactly, on any number of processes.
  """
  # One thread: more of them only fight for the interpreter's lock, and are slower.
  options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
  return iter(batches.to_iter_dataset(options))


def heldout(
  documents: Documents, sequence_length: int, batch_size: int, share: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
  """One pass over one domain's held-out documents, in order; arguments as for `batches`.

  Yields this process's rows of each batch: the arrays of `PackedSequences`, [B / parts, T].
  The last batch is filled up with padding, so that all have one shape and every process has as
  many. The weights add up to the number of targets: that of all tokens less one a document.
  """
  part, parts = share
  local_size = batch_size // parts
  packed = PackedSequences(documents, sequence_length, None)
  for start in range(0, len(packed), batch_size):
    start += part * local_size
    rows = [packed[i] for i in range(start, min(start + local_size, len(packed)))]
    rows = rows or [{key: np.zeros_like(value) for key, value in packed[0].items()}]
    fill = ((0, local_size - len(rows)), (0, 0))
    yield {key: np.pad(np.stack([row[key] for row in rows]), fill) for key in rows[0]}
