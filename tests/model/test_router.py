"""Loads, drops and tokens are counts: whole numbers, and exact at any batch size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bam_jax.model import router
from bam_jax.model.rope import Tokens
from bam_jax.train import optimizer


@jax.jit
def statistics(gates_BTE, real_BT) -> router.Statistics:
  _, _, chosen_BTE = router.top_k(gates_BTE, 3, renormalize=False)
  made = router.Assignments(gates_BTE, jnp.log(gates_BTE), chosen_BTE, jnp.zeros((), jnp.int32))
  return router.statistics(made, real_BT)


def test_loads_add_up_to_every_assignment():
  rng = np.random.default_rng(0)
  gates_BTE = rng.dirichlet(np.ones(8), (2, 50_000)).astype(np.float32)
  real_BT = np.arange(100_000).reshape(2, -1) < 94_978
  stats = statistics(gates_BTE, real_BT)
  assert stats.tokens == 94_978 and stats.load.sum() == 3 * 94_978
  chosen_NC = np.argsort(-gates_BTE.reshape(-1, 8), axis=1)[:94_978, :3]
  np.testing.assert_array_equal(stats.load, np.bincount(chosen_NC.ravel()))
  assert [x.dtype for x in (stats.tokens, stats.load, stats.dropped)] == [jnp.int32] * 3


@pytest.mark.parametrize('seed', range(3))
def test_equal_loads_move_no_bias(seed):
  # Every choice of three experts of four equally often, in a random order.
  left_out_N = np.random.default_rng(seed).permutation(np.arange(131_072) % 4)
  gates_BTE = np.where(left_out_N[:, None] == np.arange(4), 0.1, 0.3).astype(np.float32)
  stats = statistics(gates_BTE.reshape(64, -1, 4), np.ones((64, 2048), bool))
  bias_LE, load_LE = np.zeros((1, 4), np.float32), stats.load[None]
  assert not optimizer.update_expert_bias(bias_LE, load_LE, 0.1).any()
  moved = optimizer.update_expert_bias(bias_LE, load_LE + np.array([1, 0, 0, 0]), 0.1)
  np.testing.assert_allclose(moved, [[-0.1, 0.1, 0.1, 0.1]])


@pytest.mark.parametrize('memory', [0, 1, 4, 10**6])
def test_prefix_means_in_pieces_and_behind_padding(memory):
  """A row may begin in a later piece than the first: what stands before it counts for nothing."""
  rng, first_B, T = np.random.default_rng(0), np.array([0, 2, 6]), 9
  x_BTE = rng.normal(size=(3, T, 4)).astype(np.float32)
  positions_BT = np.maximum(np.arange(T) - first_B[:, None], 0)
  segments_BT = (np.arange(T) >= first_B[:, None]).astype(np.int32)
  for ends in ([9], [4, 9], [1, 2, 8, 9], range(1, 10)):
    start, sum_BE, found = 0, np.zeros((3, 4), np.float32), []
    for end in ends:
      tokens = Tokens(segments_BT[:, start:end], positions_BT[:, start:end], None, None)
      x_BPE = jnp.asarray(x_BTE[:, start:end])
      mean_BTE, sum_BE = router.prefix_mean(x_BPE, tokens, memory, sum_BE)
      found.append(mean_BTE)
      start = end
    for row, first in enumerate(first_B):
      keep = 1 - 1 / memory if memory else 1.0
      ages = np.arange(T - first)[:, None] - np.arange(T - first)
      weights = np.where(ages >= 0, keep ** np.maximum(ages, 0), 0)
      want = weights @ x_BTE[row, first:] / weights.sum(1, keepdims=True)
      np.testing.assert_allclose(np.concatenate(found, 1)[row, first:], want, atol=1e-6)
