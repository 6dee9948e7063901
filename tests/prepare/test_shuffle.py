"""Every order of the documents is equally likely, and an interrupted pass is taken up again."""

import numpy as np
import pytest

from bam_jax.data import store
from bam_jax.prepare import shuffle

DTYPE = np.dtype(np.uint16)


@pytest.fixture(autouse=True)
def small(monkeypatch):
  for where, name, value in (
    (shuffle, 'CHUNK', 4),
    (shuffle, 'SHARD', 16),
    (shuffle, 'PARTITION_TOKENS', 20),
  ):
    monkeypatch.setattr(where, name, value)


def write(folder, seed, counts=(7, 1, 12)):
  """Document n of the shards is 10 - n % 10 times the id n, has n bytes; 0 fills a chunk."""
  shards, first = [], 0
  for number, count in enumerate(counts):
    shards.append(folder / f'train-{number:06}')
    names = range(first, first + count)
    documents = [np.full(10 - name % 10, name, DTYPE) for name in names]
    shuffle.write_shard(shards[-1], documents, list(names), [seed, 0, number])
    first += count
  return shards


def order(folder, sums):
  documents = store.Documents(folder, sums, DTYPE)
  names = [document[0] for document in documents]
  assert all(len(d) == 10 - d[0] % 10 and len({*d}) == 1 for d in documents)
  np.testing.assert_array_equal(documents.byte_counts(), names)
  return [*map(int, names)]


def test_every_place_is_as_likely(tmp_path):
  """Where three documents of different shards come, over 300 seeds: chi-square, 19 degrees."""
  found, changes = np.zeros((3, 20)), 0
  for seed in range(300):
    (folder := tmp_path / str(seed)).mkdir()
    made = write(folder, seed)
    sums = shuffle.write_split(made, folder / 'store', DTYPE, [seed, 1], folder / 'done')
    names = order(folder / 'store', sums)
    assert sorted(names) == [*range(20)] and sums['documents'] == 20
    for row, name in enumerate((0, 7, 19)):
      found[row, names.index(name)] += 1
    changes += np.count_nonzero(np.diff(np.searchsorted([7, 8], names, side='right')))
  assert (((found - 15) ** 2 / 15).sum(1) < 50).all()  # by chance once in 8,000
  # Neighbours are of different shards as often as in an order of 7, 1 and 12 by chance.
  assert abs(changes / 300 - 2 * (7 * 1 + 7 * 12 + 1 * 12) / 20) < 0.5  # four deviations


@pytest.mark.parametrize('stop', range(4))
def test_an_interrupted_pass_is_taken_up_again(tmp_path, monkeypatch, stop):
  made, calls, step = write(tmp_path, 3), [], shuffle._write

  def some(*arguments):
    if len(calls) == stop:
      raise KeyboardInterrupt
    calls.append(step(*arguments))

  def attempt(name):
    return shuffle.write_split(made, tmp_path / name, DTYPE, [5], tmp_path / f'{name}.done')

  def contents(name):
    paths = sorted(path for path in (tmp_path / name).rglob('*') if path.is_file())
    return {path.relative_to(tmp_path / name): path.read_bytes() for path in paths}

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(shuffle, '_write', some)
    attempt('stopped')
  assert attempt('stopped') == attempt('whole') == attempt('whole')  # nothing is left to do then
  assert contents('stopped') == contents('whole') and len(contents('whole')) > 4
