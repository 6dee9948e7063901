"""Packing loses nothing, and the batch of a step depends on the seed and the step alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bam_jax.data import mixture
from bam_jax.errors import UserError

ARRAYS = dict.fromkeys(('tokens', 'targets', 'segments', 'positions'), np.int32)
ARRAYS['weights'] = np.float32


class Documents:
  """Documents in memory, no token twice, so that a pair of tokens names one place."""

  def __init__(self, lengths, first_token=1):
    ends = np.cumsum([0, *lengths])
    self.num_tokens, self.reads = int(ends[-1]), []
    self.arrays = [np.arange(a, b) + first_token for a, b in zip(ends, ends[1:])]
    self.values = np.zeros((2, self.num_tokens), np.uint32)
    self.values[0] = np.arange(self.num_tokens) + first_token
    self.values[1, ends[:-1]] = 1

  def request(self, start, size):
    self.reads.append(start)
    return self.values[:, start : start + size]

  def finish(self, name, values):
    return values

  def pairs(self):
    return Counter(pair for array in self.arrays for pair in zip(array[:-1], array[1:]))


def windows(documents, sequence_length):
  """All windows of some documents, in order."""
  count = mixture.num_windows(documents, sequence_length)
  batch = mixture.read([(documents, i) for i in range(count)], sequence_length)
  assert {key: value.dtype for key, value in batch.items()} == ARRAYS
  assert all(value.shape == (count, sequence_length) for value in batch.values())
  return [{key: value[i] for key, value in batch.items()} for i in range(count)]


def pairs(items):
  """The (input, target) pairs that count, and how often each."""
  return Counter(
    pair
    for item in items
    for pair in zip(item['tokens'][item['weights'] == 1], item['targets'][item['weights'] == 1])
  )


def domains(sizes=(40, 60, 50), seed=0):
  rng = np.random.default_rng(seed)
  return {
    name: Documents(rng.integers(2, 30, count), 100_000 * (i + 1))
    for i, (name, count) in enumerate(zip(('code', 'general', 'law'), sizes))
  }


def domains_of(batch):
  """The name of each sequence's domain, by the ids of its tokens."""
  return np.array(['', *domains()])[batch['tokens'][:, 0] // 100_000]


def make(weights=None, **options):
  weights = {'general': 0.5, 'code': 0.25, 'law': 0.25} if weights is None else weights
  defaults = dict(sequence_length=16, batch_size=8, seed=7)
  return mixture.batches(domains(), weights, **(defaults | options))


def same(left, right):
  return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


@settings(max_examples=50, deadline=None)
@given(
  lengths=st.lists(st.integers(2, 20), min_size=1, max_size=12), sequence_length=st.integers(1, 25)
)
def test_every_pair_once(lengths, sequence_length):
  documents = Documents(lengths)
  items = windows(documents, sequence_length)
  assert pairs(items) == documents.pairs()
  assert all((item['segments'] > 0).all() for item in items[:-1])


@settings(max_examples=30, deadline=None)
@given(
  lengths=st.lists(st.integers(2, 9), min_size=1, max_size=9), sequence_length=st.integers(2, 20)
)
def test_segments_and_positions(lengths, sequence_length):
  documents = Documents(lengths)
  owner = {token: i for i, array in enumerate(documents.arrays) for token in array}
  for item in windows(documents, sequence_length):
    pieces = []
    for token, segment, position in zip(item['tokens'], item['segments'], item['positions']):
      if segment == 0:
        assert (token, position) == (0, 0)
        continue
      if not pieces or pieces[-1][0] != owner[token]:
        pieces.append((owner[token], 0))
      assert (segment, position) == (len(pieces), pieces[-1][1])
      pieces[-1] = (pieces[-1][0], position + 1)
    padding = item['segments'] == 0
    assert np.array_equal(padding, np.sort(padding))


def test_an_epoch_is_each_sequence_once_and_the_next_is_shuffled_anew():
  documents = domains()['code']
  count = mixture.num_windows(documents, 16)
  stream = mixture.batches(
    {'code': documents}, {'code': 2.0}, sequence_length=16, batch_size=1, seed=0
  )
  epochs = [[stream[n] for n in range(e * count, (e + 1) * count)] for e in range(2)]
  assert pairs(epochs[0]) == pairs(epochs[1]) == documents.pairs()
  assert not all(same(left, right) for left, right in zip(*epochs))


@pytest.mark.parametrize(
  'weights', [{'general': 2, 'code': 1, 'law': 1}, {'general': 0.1, 'code': 0.9}, {'law': 3.0}]
)
def test_shares_are_exact(weights):
  stream = make(weights, batch_size=20)
  seen = np.concatenate([domains_of(stream[n]) for n in range(50)])
  total = sum(weights.values())
  for name in weights:
    counts = np.cumsum(seen == name)
    expected = np.arange(1, len(seen) + 1) * weights[name] / total
    assert np.abs(counts - expected).max() < len(weights)
    assert counts[-1] == pytest.approx(1000 * weights[name] / total, abs=1)


def test_a_domain_keeps_its_order_when_others_change():
  alone = make({'law': 1.0})
  mixed = make({'law': 0.5, 'code': 0.5})
  from_law = np.concatenate([b['tokens'][domains_of(b) == 'law'] for b in (mixed[0], mixed[1])])
  assert np.array_equal(from_law, alone[0]['tokens'])


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_processes_join_to_the_same_batch(processes):
  whole = make()
  assert same(whole[5], make()[5]) and not same(whole[5], make(seed=8)[5])
  parts = [make(share=(i, processes)) for i in range(processes)]
  for step in (0, 1, 17, 1_000_000):
    batches = [part[step] for part in parts]
    joined = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    assert same(joined, whole[step])
    assert joined['tokens'].shape == (8, 16)


@pytest.mark.parametrize('prefetch', [0, 2])
def test_resume_is_exact(prefetch):
  stream = make()
  expected = [stream[n] for n in range(12)]
  iterator = mixture.iterate(stream, prefetch)
  assert all(same(next(iterator), expected[n]) for n in range(5))
  state = iterator.get_state()

  restored = mixture.iterate(stream, prefetch)
  next(restored)
  restored.set_state(state)
  for n in range(5, 12):
    assert same(next(iterator), expected[n])
    assert same(next(restored), expected[n])


@settings(max_examples=50, deadline=None)
@given(
  lengths=st.lists(st.integers(2, 20), min_size=1, max_size=12),
  sequence_length=st.integers(1, 16),
  processes=st.sampled_from([1, 2]),
)
def test_heldout_counts_every_target_once(lengths, sequence_length, processes):
  documents = Documents(lengths)
  heldout = lambda i: list(mixture.heldout(documents, sequence_length, 4, (i, processes)))
  parts = [heldout(i) for i in range(processes)]
  assert len({len(part) for part in parts}) == 1
  everything = [batch for part in parts for batch in part]
  assert all(b[k].shape == (4 // processes, sequence_length) for b in everything for k in ARRAYS)
  assert all({k: v.dtype for k, v in b.items()} == ARRAYS for b in everything)
  assert pairs(everything) == documents.pairs()
  assert sum(b['weights'].sum() for b in everything) == sum(lengths) - len(lengths)
  if processes == 1:
    tokens = np.concatenate([batch['tokens'].ravel() for batch in everything])
    assert np.array_equal(tokens[: sum(lengths) - 1], np.arange(1, sum(lengths))), 'in order'


def test_a_process_reads_its_own_rows_and_no_others():
  everything, each = domains(), [domains() for _ in range(4)]
  weights, how = dict(general=2, code=1, law=1), dict(sequence_length=16, batch_size=8, seed=7)
  mixture.batches(everything, weights, **how)[5]
  for part, documents in enumerate(each):
    mixture.batches(documents, weights, **how, share=(part, 4))[5]
  for name, documents in everything.items():
    assert sum((own[name].reads for own in each), []) == documents.reads


def test_a_domain_that_cannot_be_read_is_explained():
  how = dict(sequence_length=4, batch_size=1, seed=0)
  with pytest.raises(UserError, match="'code' has no text"):
    mixture.batches({'code': Documents([])}, {'code': 1.0}, **how)
  large = Documents([2])
  large.num_tokens = 4 * 2**32
  with pytest.raises(UserError, match="'code' has 4,294,967,296 sequences, more than .* raise seq"):
    mixture.batches({'code': large}, {'code': 1.0}, **how)
