"""Of two buffers the one that is long enough is taken, and both give what every expert would."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bam_jax.model import dispatch, remat
from bam_jax.model.kernels import grouped, sorted_rows

D, F, E = 6, 10, 3
P, USUAL = 131, 60
# The expert that each pair wants; E is none.
CHOICES = {
  'few': [0, 1, 3, 2, 3] * 7 + [3] * 96,
  'as many as usual': [0, 3] * 40 + [2] * 20 + [3] * 31,
  'one more than usual': [0, 3] * 40 + [2] * 21 + [3] * 30,
  'all to one': [1] * P,
  'all to all': [0, 1, 2, 2] * 32 + [0] * 3,
  'nobody': [3] * P,
}


def draw(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, SLOPE = draw(0, P, D), draw(4, P, D)
WEIGHTS = draw(1, E, D, F), draw(2, E, D, F), draw(3, E, F, D)


def run(matmul, usual, experts_P, x_PD, weights):
  slots = dispatch.blocks(experts_P, E, 1)
  return sorted_rows.swiglu(matmul, usual, x_PD, weights, slots)


def every_expert(experts_P, x_PD, weights):
  """Every expert on every row, those kept that the row wants."""
  gate_EDF, up_EDF, down_EFD = weights
  hidden_PEF = jax.nn.silu(jnp.einsum('pd,edf->pef', x_PD, gate_EDF))
  hidden_PEF *= jnp.einsum('pd,edf->pef', x_PD, up_EDF)
  return jnp.einsum('pef,efd,pe->pd', hidden_PEF, down_EFD, experts_P[:, None] == np.arange(E))


def with_slopes(function, experts_P, dtype=np.float32):
  x, weights, slope = jax.tree.map(lambda a: jnp.asarray(a, dtype), (X, WEIGHTS, SLOPE))
  output, pull = jax.vjp(functools.partial(function, experts_P), x, weights)
  return jax.tree.leaves((output, pull(slope)))


@functools.cache
def jitted(usual: int, policy: str):
  function = functools.partial(run, grouped.ragged, usual)
  return jax.jit(functools.partial(with_slopes, remat.wrap(policy, True)(function)))


@pytest.mark.parametrize('usual', [USUAL, P])
@pytest.mark.parametrize('policy', ['matmuls', 'full'])
@pytest.mark.parametrize('experts', CHOICES.values(), ids=CHOICES)
def test_agrees_with_every_expert_on_every_row(experts, policy, usual):
  experts_P = np.array(experts, np.int32)
  with jax.enable_x64(True):
    want = with_slopes(every_expert, experts_P, np.float64)
  for one, other in zip(jitted(usual, policy)(experts_P), want, strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=5e-6 * max(np.abs(other).max(), 1))


def test_neither_program_is_taken_for_the_other(monkeypatch):
  """With the full program broken, results are wrong exactly where rows do not fit."""
  either = sorted_rows._either
  broken = lambda usual, slots, short, full: either(
    usual, slots, short, lambda slots: jax.tree.map(jnp.zeros_like, full(slots))
  )
  function = jax.jit(functools.partial(run, grouped.ragged, USUAL))
  right = {name: function(np.array(c, np.int32), X, WEIGHTS) for name, c in CHOICES.items()}
  monkeypatch.setattr(sorted_rows, '_either', broken)
  function = jax.jit(lambda *arguments: run(grouped.ragged, USUAL, *arguments))
  wrong = {
    name
    for name, c in CHOICES.items()
    if (function(np.array(c, np.int32), X, WEIGHTS) != right[name]).any()
  }
  assert wrong == {'one more than usual', 'all to one', 'all to all'}


def test_no_more_is_saved_than_the_usual_rows():
  experts_P = np.array(CHOICES['few'], np.int32)

  def hidden(usual):
    function = remat.wrap('matmuls', True)(functools.partial(run, grouped.ragged, usual))
    _, pull = jax.eval_shape(functools.partial(jax.vjp, function), experts_P, X, WEIGHTS)
    return [x.shape for x in jax.tree.leaves(pull) if x.shape[1:] == (F,)]

  assert hidden(USUAL) == [(USUAL, F)] * 2 and hidden(P) == [(P, F)] * 2


def test_megablocks_in_both():
  matmul = functools.partial(grouped.megablocks, interpret=True)
  function = jax.jit(functools.partial(with_slopes, functools.partial(run, matmul, USUAL)))
  for name in ('few', 'all to all'):
    experts_P = np.array(CHOICES[name], np.int32)
    for one, other in zip(function(experts_P), jitted(P, 'full')(experts_P), strict=True):
      np.testing.assert_allclose(one, other, rtol=0, atol=5e-6 * max(np.abs(other).max(), 1))
