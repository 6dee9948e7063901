"""Every pair of a token and its choice gets a row of its expert's, or came too late for one.

The index arithmetic runs for arbitrary choices; the model's tests only see likely ones.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bam_jax.model import dispatch

MAX_EXPERTS = 5
# A few lengths, so that few programs are compiled.
LENGTHS = (1, 12)


@functools.cache
def jitted(name: str, num_experts: int, rows: int):
  return jax.jit(functools.partial(getattr(dispatch, name), num_experts=num_experts, rows=rows))


def place(name: str, experts: list[int], num_experts: int, rows: int) -> dispatch.Slots:
  slots = jitted(name, num_experts, rows)(np.array(experts, np.int32))
  return jax.tree.map(np.asarray, slots)


@st.composite
def choices(draw) -> tuple[list[int], int, int]:
  """Experts of pairs (E is a pair that wants none), E, and rows of a part."""
  num_experts = draw(st.sampled_from([2, MAX_EXPERTS]))
  length = draw(st.sampled_from(LENGTHS))
  wanted = st.integers(0, num_experts) | st.sampled_from([0, num_experts])
  experts = draw(st.lists(wanted, min_size=length, max_size=length))
  return experts, num_experts, draw(st.sampled_from([1, 5]))


def check_places(slots: dispatch.Slots, experts: list[int], num_experts: int, rows: int) -> None:
  """What blocks and buffers have in common."""
  num_pairs, num_slots = len(experts), len(slots.pair_of_slot)
  assert num_slots == rows * len(slots.expert_of_part)
  assert slots.sizes.tolist() == [experts.count(expert) for expert in range(num_experts)]
  # The two maps are each other's inverse; an index past the end is nowhere.
  for pair, slot in enumerate(slots.slot_of_pair):
    assert 0 <= slot <= num_slots
    if slot < num_slots:
      assert slots.pair_of_slot[slot] == pair
      assert slots.expert_of_part[slot // rows] == experts[pair], 'its own expert works on it'
  for slot, pair in enumerate(slots.pair_of_slot):
    assert 0 <= pair <= num_pairs
    if pair < num_pairs:
      assert slots.slot_of_pair[pair] == slot
  for pair, expert in enumerate(experts):
    if expert == num_experts:
      assert slots.slot_of_pair[pair] == num_slots, 'padding goes nowhere'


EDGES = [
  ([0] * 12, 1, 5),
  ([4] * 12, MAX_EXPERTS, 5),  # all to one expert
  ([MAX_EXPERTS] * 12, MAX_EXPERTS, 5),  # nobody wants any
  ([2], MAX_EXPERTS, 5),  # more experts than pairs, more rows than pairs
  ([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1], MAX_EXPERTS, 5),  # each expert a part that is not full
]


def check_blocks(experts: list[int], num_experts: int, rows: int) -> None:
  slots = place('blocks', experts, num_experts, rows)
  check_places(slots, experts, num_experts, rows)
  num_slots = len(slots.pair_of_slot)
  placed = [pair for pair in range(len(experts)) if slots.slot_of_pair[pair] < num_slots]
  assert placed == [pair for pair, expert in enumerate(experts) if expert < num_experts]


@settings(max_examples=100, deadline=None)
@given(choices())
def test_blocks_place_every_pair_once(case):
  check_blocks(*case)


@pytest.mark.parametrize('experts, num_experts, rows', EDGES)
def test_blocks_at_the_edges(experts, num_experts, rows):
  check_blocks(experts, num_experts, rows)


def check_buffers(experts: list[int], num_experts: int, rows: int) -> None:
  slots = place('buffers', experts, num_experts, rows)
  check_places(slots, experts, num_experts, rows)
  assert slots.expert_of_part.tolist() == list(range(num_experts))
  num_slots = len(slots.pair_of_slot)
  for expert in range(num_experts):
    wanting = [pair for pair, choice in enumerate(experts) if choice == expert]
    kept = [pair for pair in wanting if slots.slot_of_pair[pair] < num_slots]
    assert kept == wanting[:rows], 'the first come are served'


@settings(max_examples=100, deadline=None)
@given(choices())
def test_buffers_drop_the_latest(case):
  check_buffers(*case)


@pytest.mark.parametrize('experts, num_experts, rows', EDGES)
def test_buffers_at_the_edges(experts, num_experts, rows):
  check_buffers(experts, num_experts, rows)


@functools.cache
def moved_and_gradients(name: str, num_experts: int, rows: int):
  """A weighted sum of moved rows and its gradient, by `move` and by plain indexing."""

  def run(experts, x, weights):
    slots = getattr(dispatch, name)(experts, num_experts, rows)
    there_and_back = slots.pair_of_slot, slots.slot_of_pair

    def by_move(x):
      rows_SD = dispatch.move(x, *there_and_back)
      back_PD = dispatch.move(jnp.sin(rows_SD), *there_and_back[::-1])
      return jnp.vdot(back_PD, weights), (rows_SD, back_PD)

    def by_index(x):
      read = lambda rows, index: jnp.concatenate([rows, jnp.zeros((1, 2))])[index]
      rows_SD = read(x, slots.pair_of_slot)
      back_PD = read(jnp.sin(rows_SD), slots.slot_of_pair)
      return jnp.vdot(back_PD, weights), (rows_SD, back_PD)

    return [jax.value_and_grad(fn, has_aux=True)(x) for fn in (by_move, by_index)]

  return jax.jit(run)


def check_move(name: str, experts: list[int], num_experts: int, rows: int) -> None:
  rng = np.random.default_rng(len(experts))
  x, weights = rng.normal(size=(2, len(experts), 2)).astype(np.float32)
  run = moved_and_gradients(name, num_experts, rows)
  (value, moved), slope = (got := run(np.array(experts, np.int32), x, weights))[0]
  (want_value, want_moved), want_slope = got[1]
  for ours, theirs in zip((value, *moved, slope), (want_value, *want_moved, want_slope)):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
  slots = place(name, experts, num_experts, rows)
  nowhere = slots.slot_of_pair == len(slots.pair_of_slot)
  assert not slope[nowhere].any() and not moved[1][nowhere].any()
  assert np.abs(slope[~nowhere]).min(initial=1) > 0


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(['blocks', 'buffers']), choices())
def test_the_gradient_of_move_is_that_of_indexing(name, case):
  check_move(name, *case)


@pytest.mark.parametrize('name', ['blocks', 'buffers'])
@pytest.mark.parametrize('experts, num_experts, rows', EDGES)
def test_the_gradient_of_move_at_the_edges(name, experts, num_experts, rows):
  check_move(name, experts, num_experts, rows)


def test_move_reads_zeros_past_the_end():
  rows = jnp.arange(1.0, 7.0).reshape(3, 2)
  moved = dispatch.move(rows, jnp.array([2, 3, 0, 3]), jnp.array([2, 4, 0]))
  assert moved.tolist() == [[5, 6], [0, 0], [1, 2], [0, 0]]
