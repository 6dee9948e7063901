"""Batches from weighted domains: batch `n` is a pure function of the seed and `n`.

A run resumes at any step, on any number of hosts, with the very batches that it would have seen.
The documents of a domain lie end to end and are cut into windows of one length, hence a domain's
share of the sequences is its share of the tokens.

Legend: B batch, T sequence, S = T + 1.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np

from bam_jax.config.strict import require
from bam_jax.data import store
from bam_jax.data.store import Documents

Batch = dict[str, np.ndarray]
MAX_WINDOWS = 2**32 - 1  # of one domain; grain's shuffle without memory has numbers of 32 bits


def num_windows(documents: Documents, sequence_length: int) -> int:
  """How many windows of T + 1 tokens hold every (input, next token) pair of some documents.

  The next window starts T later, so that a window's last target is the next one's first input and
  every pair is in exactly one.
  """
  return math.ceil(max(documents.num_tokens - 1, 0) / sequence_length)


def read(windows: Sequence[tuple[Documents, int]], sequence_length: int) -> Batch:
  """Windows of some documents by their numbers, all read at once, as arrays of [B, T].

  tokens: int32, the inputs.
  targets: int32, the token after each input.
  segments: int32, 1, 2, ... by document in order of appearance; 0 is padding, which only the tail
    of the last window has, and all of one whose number is past it.
  positions: int32, counted from 0 at the start of each document's piece in the window.
  weights: float32, 1 where input and target lie in the same document, else 0.
  """
  places = [(documents, int(number) * sequence_length) for documents, number in windows]
  ids_BS, begins_BS = store.read(places, sequence_length + 1)
  left_B1 = np.array([[documents.num_tokens - start] for documents, start in places])
  place_S = np.arange(sequence_length + 1)
  valid_BS = place_S < left_B1
  begins_BS[:, 0] = True
  segments_BS = np.cumsum(begins_BS, axis=1, dtype=np.int32) * valid_BS
  positions_BS = place_S - np.maximum.accumulate(place_S * begins_BS, axis=1)
  same_document = (segments_BS[:, 1:] == segments_BS[:, :-1]) & valid_BS[:, 1:]
  return {
    'tokens': ids_BS[:, :-1],
    'targets': ids_BS[:, 1:],
    'segments': segments_BS[:, :-1],
    'positions': (positions_BS * valid_BS)[:, :-1].astype(np.int32),
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
    arrays of `read`, [B / parts, T]. The parts, joined in their order, are the same batch whatever
    their number.
  """
  names, order = sorted(weights), []
  for domain, name in enumerate(names):
    count = num_windows(documents[name], sequence_length)
    require(count, f'The domain {name!r} has no text to train on: prepare it again.')
    wrong = f'The domain {name!r} has {count:,} sequences, more than {MAX_WINDOWS:,}, the most that'
    fix = 'can be shuffled: raise sequence_length, or divide the domain.'
    require(count <= MAX_WINDOWS, f'{wrong} {fix}')
    window_seed = int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1)[0])
    shuffled = grain.MapDataset.range(count).shuffle(window_seed).repeat()
    order.append(shuffled.map(lambda number, domain=domain: np.array([domain, number])))

  # Grain scales the smallest weight to 100 and truncates the others: round them before it does.
  shares = [round(100 * weights[name] / min(weights.values())) for name in names]
  # Only numbers so far, [B / parts, 2]. Sliced after batching, a process holds consecutive rows of
  # each global batch; it reads no more than those, because items are made only when asked for.
  part, parts = share
  mixed = grain.MapDataset.mix(order, shares)
  mine = mixed.batch(batch_size // parts, drop_remainder=True)[part::parts]

  def windows(rows_B2: np.ndarray) -> list[tuple[Documents, int]]:
    return [(documents[names[domain]], number) for domain, number in rows_B2]

  return mine.map(lambda rows_B2: read(windows(rows_B2), sequence_length))


def iterate(batches: grain.MapDataset[Batch], prefetch: int) -> grain.DatasetIterator[Batch]:
  """Iterates over batches, with `prefetch` of them made ahead in threads (0: none).

  `get_state()` and `set_state()` of the iterator resume exactly, on any number of processes.
  """
  # As many threads as batches: one waits for its storage as a whole, and a bucket takes long.
  options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
  return iter(batches.to_iter_dataset(options))


def heldout(
  documents: Documents, sequence_length: int, batch_size: int, share: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
  """One pass over one domain's held-out documents, in order; arguments as for `batches`.

  Yields this process's rows of each batch: the arrays of `read`, [B / parts, T]. The last batch is
  filled up with padding, so that all have one shape and every process has as many. The weights add
  up to the number of targets: that of all tokens less one a document.
  """
  part, parts = share
  rows = batch_size // parts
  for start in range(0, num_windows(documents, sequence_length), batch_size):
    start += part * rows
    yield read([(documents, number) for number in range(start, start + rows)], sequence_length)
