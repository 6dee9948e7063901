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
    self.lengths = np.asarray(lengths, np.int64)
    ends = first_token + np.cumsum(self.lengths)
    self.arrays = [np.arange(end - n, end, dtype=np.uint32) for n, end in zip(lengths, ends)]

  def read(self, i, start, stop):
    assert 0 <= start < stop <= self.lengths[i]
    return self.arrays[i][start:stop]

  def pairs(self):
    return Counter(pair for array in self.arrays for pair in zip(array[:-1], array[1:]))


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
  lengths=st.lists(st.integers(2, 20), min_size=1, max_size=12),
  sequence_length=st.integers(1, 25),
  seed=st.none() | st.integers(0, 5),
)
def test_every_pair_once(lengths, sequence_length, seed):
  documents = Documents(lengths)
  packed = mixture.PackedSequences(documents, sequence_length, seed)
  items = [packed[i] for i in range(len(packed))]
  assert pairs(items) == documents.pairs()
  for item in items:
    assert {key: value.dtype for key, value in item.items()} == ARRAYS
    assert all(value.shape == (sequence_length,) for value in item.values())
  assert all((item['segments'] > 0).all() for item in items[:-1])


@settings(max_examples=30, deadline=None)
@given(
  lengths=st.lists(st.integers(2, 9), min_size=1, max_size=9), sequence_length=st.integers(2, 20)
)
def test_segments_and_positions(lengths, sequence_length):
  documents = Documents(lengths)
  owner = {token: i for i, array in enumerate(documents.arrays) for token in array}
  packed = mixture.PackedSequences(documents, sequence_length, 3)
  for item in (packed[i] for i in range(len(packed))):
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
  count = len(mixture.PackedSequences(documents, 16, None))
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


def test_an_empty_domain_is_explained():
  with pytest.raises(UserError, match="'code' has no text"):
    mixture.batches({'code': Documents([])}, {'code': 1.0}, sequence_length=4, batch_size=1, seed=0)
