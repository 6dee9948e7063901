"""Kernels of FFN experts: every assignment meets its expert and no other, forward and backward.

The index arithmetic runs for arbitrary choices; the model's tests only see likely ones.
"""

import base64
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from bam_jax.model import dispatch, remat
from bam_jax.model.activation import Weights
from bam_jax.model.kernels import blocked, few, grouped

D, F = 6, 10


def draw(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weights_of(E: int, dtype=np.float32, kind: str = 'swiglu') -> Weights:
  """Of `kind`, with biases unless that is SwiGLU."""
  into, down = [draw(1, E, D, F), draw(2, E, D, F)], draw(3, E, F, D)
  biases = [] if kind == 'swiglu' else [draw(5, E, F), draw(6, E, F)]
  if kind == 'gelu':
    into, biases = into[1:], biases[1:]
  arrays = Weights(tuple(into), down, tuple(biases), kind)
  return jax.tree.map(lambda array: jnp.asarray(array, dtype), arrays)


def one_hot_ffn(experts_A, x_AD, weights):
  """Every expert on every row, those kept that the row wants."""
  products = [jnp.einsum('ad,edf->aef', x_AD, w_EDF) for w_EDF in weights.into]
  products = [x + b for x, b in zip(products, weights.biases or [0, 0])]
  kinds = {'swiglu': jax.nn.silu, 'geglu_tanh': jax.nn.gelu}
  if weights.ffn == 'gelu':
    hidden_AEF = products[0] * jax.scipy.stats.norm.cdf(products[0])
  else:
    hidden_AEF = kinds[weights.ffn](products[0]) * products[1]
  chosen_AE = experts_A[:, None] == np.arange(weights.down.shape[0])
  return jnp.einsum('aef,efd,ae->ad', hidden_AEF, weights.down, chosen_AE)


def with_gradients(ffn, experts_A, dtype=np.float32, kind='swiglu'):
  """The output, and the gradients of rows and weights."""
  x_AD, cotangent_AD = (jnp.asarray(draw(i, experts_A.size, D), dtype) for i in (0, 4))
  output, pull = jax.vjp(functools.partial(ffn, experts_A), x_AD, weights_of(3, dtype, kind))
  return jax.tree.leaves((output, pull(cotangent_AD)))


def assert_near(got, want, tolerance: float) -> None:
  for one, other in zip(got, want, strict=True):
    scale = max(np.abs(other).max(), 1)
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


# Where assignments go.


@functools.cache
def jitted(name: str, num_experts: int, rows: int):
  return jax.jit(functools.partial(getattr(dispatch, name), num_experts=num_experts, rows=rows))


EDGES = [
  ([0] * 12, 2, 5),
  ([4] * 12, 5, 5),  # all to one expert
  ([5] * 12, 5, 5),  # nobody wants any
  ([2], 5, 5),  # more experts than assignments, more rows than assignments
  ([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1], 5, 5),  # each expert a part that is not full
]


def check_slots(name: str, experts: list[int], num_experts: int, rows: int) -> None:
  slots = jitted(name, num_experts, rows)(np.array(experts, np.int32))
  slots = jax.tree.map(np.asarray, slots)
  num_assignments, num_slots = len(experts), len(slots.assignment_of_slot)
  assert num_slots == rows * len(slots.expert_of_part)
  assert slots.sizes.tolist() == [experts.count(expert) for expert in range(num_experts)]
  # The two maps are each other's inverse; an index past the end is nowhere.
  for assignment, slot in enumerate(slots.slot_of_assignment):
    assert 0 <= slot <= num_slots
    if slot < num_slots:
      assert slots.assignment_of_slot[slot] == assignment
      assert slots.expert_of_part[slot // rows] == experts[assignment], 'its own expert'
  for slot, assignment in enumerate(slots.assignment_of_slot):
    assert 0 <= assignment <= num_assignments
    if assignment < num_assignments:
      assert slots.slot_of_assignment[assignment] == slot
  for expert in range(num_experts + 1):
    wanting = [i for i, choice in enumerate(experts) if choice == expert]
    placed = [i for i in wanting if slots.slot_of_assignment[i] < num_slots]
    room = {'blocks': len(wanting), 'buffers': rows}[name] if expert < num_experts else 0
    assert placed == wanting[:room], 'the first come are served, padding goes nowhere'


@pytest.mark.parametrize('name', ['blocks', 'buffers'])
def test_every_assignment_has_a_slot_or_came_too_late(name):
  for case in EDGES:
    check_slots(name, *case)
  rng = np.random.default_rng(0)
  for _ in range(50):
    experts = rng.integers(0, 1 + rng.choice([2, 5]), 12)
    check_slots(name, experts.tolist(), 5, rng.choice([1, 5]).item())


# A loop over blocks, on CPU and GPU.

# The rows of a part, and the expert of each assignment; 3 is none.
BLOCKED = {
  'even': (4, [0, 1, 2] * 40),
  'all want one': (4, [1] * 100),
  'nobody wants any': (4, [3] * 20),
  'uneven, some want none': (4, [0] * 3 + [2, 3] * 45 + [0] * 9),
  'one part': (64, [2, 0, 1, 2, 3]),
  'parts of one row': (1, [0, 1, 1, 3, 2, 0]),
}


@pytest.mark.parametrize('rows, experts', BLOCKED.values(), ids=BLOCKED)
def test_blocks_agree_with_one_hot(rows, experts, monkeypatch):
  monkeypatch.setattr(grouped, 'BLOCK_ROWS', {'cpu': rows})
  experts_A = np.array(experts, np.int32)
  ffn = lambda experts_A, x, weights: grouped.ffn(x, experts_A, weights, 3, 'cpu')
  with jax.enable_x64(True):
    want = with_gradients(one_hot_ffn, experts_A, np.float64)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 5e-6)):
      got = jax.jit(functools.partial(with_gradients, ffn, dtype=dtype))(experts_A)
      assert all(x.dtype == dtype for x in got)
      assert_near(got, want, tolerance)


def test_parts_past_the_last_are_not_visited():
  slots = dispatch.blocks(jnp.array([0, 1, 1, 2, 2, 2, 2], jnp.int32), 2, 2)
  x, cotangent = draw(0, 10, D), draw(4, 10, D)
  x[4:] = cotangent[4:] = np.nan  # one row of expert 0 and two of expert 1 fill two parts of five
  x[1] = 0
  output, pull = jax.vjp(lambda x, w: blocked.ffn(x, w, slots), x, weights_of(2))
  d_x, d_weights = pull(cotangent)
  assert not output[4:].any() and not d_x[4:].any()
  assert all(np.isfinite(d_w).all() and d_w.any() for d_w in jax.tree.leaves(d_weights))


# Grouped matmuls and two buffers, on TPU.

# Rows of the buffer, and how many of them are each expert's.
SIZES = {
  'full': (128, [50, 30, 48]),
  'not full, no whole tile, an idle expert': (100, [31, 0, 17]),
  'more tiles than one': (600, [260, 257, 3]),
  'nobody': (40, [0, 0]),
  'one expert': (130, [129]),
}


@pytest.mark.parametrize('num_rows, sizes', SIZES.values(), ids=SIZES)
def test_a_grouped_matmul_agrees_with_one_hot(num_rows, sizes):
  x, w, cotangent = draw(0, num_rows, D), draw(1, len(sizes), D, F), draw(2, num_rows, F)
  used = sum(sizes)
  expert_of_row = np.append(np.repeat(np.arange(len(sizes)), sizes), [-1] * (num_rows - used))
  arrays = (expert_of_row[:, None] == np.arange(len(sizes)), x, w, cotangent)
  exact = [a.astype(np.float64) for a in arrays]
  want = [
    np.einsum('se,sd,edf->sf', *exact[:3]),
    np.einsum('se,sf,edf->sd', exact[0], exact[3], exact[2]),
    np.einsum('se,sd,sf->edf', exact[0], exact[1], exact[3]),
  ]
  x[used:] = cotangent[used:] = np.nan  # what empty rows hold does not matter
  output, pull = jax.vjp(lambda x, w: grouped.matmul(x, w, jnp.array(sizes, jnp.int32)), x, w)
  for ours, theirs in zip((output, *pull(cotangent)), want, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu')
@pytest.mark.parametrize('num_rows', [4096, pytest.param(1003, marks=pytest.mark.slow)])
def test_compiled_for_a_tpu_it_counts_its_tiles_from_the_sizes(num_rows, monkeypatch):
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  chip = topologies.get_topology_desc(topology_name='v5e:2x2', platform='tpu').devices[0]
  place = jax.sharding.SingleDeviceSharding(chip)
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def forward_and_backward(x, w, sizes, cotangent):
    output, pull = jax.vjp(lambda x, w: grouped.matmul(x, w, sizes), x, w)
    return output, *pull(cotangent)

  program = jax.jit(forward_and_backward).lower(
    array(jnp.bfloat16, num_rows, 512),
    array(jnp.bfloat16, 4, 512, 256),
    array(jnp.int32, 4),
    array(jnp.bfloat16, num_rows, 256),
  )
  bodies = re.findall('"body":"([^"]*)"', program.compile().as_text())
  found = [
    re.search(rb'iteration_bounds = array<i64: ([^>]*)>', base64.b64decode(b)) for b in bodies
  ]
  grids = [[int(bound) for bound in match[1].split(b',')] for match in found if match]
  unknown = -(2**63)  # until the program runs
  assert len(grids) == 3, 'output and both gradients are kernels, and no matmul is dense'
  assert all(grid.count(unknown) == 1 for grid in grids)


A, USUAL = 131, 60
# The expert of each assignment; 3 is none.
BUFFERED = {
  'few': [0, 1, 3, 2, 3] * 7 + [3] * 96,
  'as many as usual': [0, 3] * 40 + [2] * 20 + [3] * 31,
  'one more than usual': [0, 3] * 40 + [2] * 21 + [3] * 30,
  'all to one': [1] * A,
  'all to all': [0, 1, 2, 2] * 32 + [0] * 3,
  'nobody': [3] * A,
}


def two_buffers(usual, experts_A, x_AD, weights):
  return grouped.two_buffers(usual, x_AD, weights, dispatch.blocks(experts_A, 3, 1))


@functools.cache
def buffered(usual: int, policy: str):
  function = remat.checkpoint(functools.partial(two_buffers, usual), policy)
  return jax.jit(functools.partial(with_gradients, function))


@pytest.mark.parametrize('usual', [USUAL, A])
@pytest.mark.parametrize('policy', ['matmuls', 'full'])
@pytest.mark.parametrize('experts', BUFFERED.values(), ids=BUFFERED)
def test_two_buffers_agree_with_one_hot(experts, policy, usual):
  experts_A = np.array(experts, np.int32)
  with jax.enable_x64(True):
    want = with_gradients(one_hot_ffn, experts_A, np.float64)
  assert_near(buffered(usual, policy)(experts_A), want, 5e-6)


def test_neither_buffer_is_taken_for_the_other(monkeypatch):
  """With the full program broken, results are wrong exactly where rows do not fit."""
  either = grouped._either
  broken = lambda usual, slots, short, full: either(
    usual, slots, short, lambda slots: jax.tree.map(jnp.zeros_like, full(slots))
  )
  arguments = {
    name: (np.array(c, np.int32), draw(0, A, D), weights_of(3)) for name, c in BUFFERED.items()
  }
  function = jax.jit(functools.partial(two_buffers, USUAL))
  right = {name: function(*args) for name, args in arguments.items()}
  monkeypatch.setattr(grouped, '_either', broken)
  function = jax.jit(lambda *arguments: two_buffers(USUAL, *arguments))
  wrong = {name for name, args in arguments.items() if (function(*args) != right[name]).any()}
  assert wrong == {'one more than usual', 'all to one', 'all to all'}


def test_no_more_is_saved_than_the_usual_rows():
  experts_A = np.array(BUFFERED['few'], np.int32)

  def hidden(usual):
    function = remat.checkpoint(functools.partial(two_buffers, usual), 'matmuls')
    arguments = experts_A, draw(0, A, D), weights_of(3)
    _, pull = jax.eval_shape(functools.partial(jax.vjp, function), *arguments)
    return [x.shape for x in jax.tree.leaves(pull) if x.shape[1:] == (F,)]

  assert hidden(USUAL) == [(USUAL, F)] * 2 and hidden(A) == [(A, F)] * 2


# Few rows, in decoding.

# Experts, D, F, and the expert of each row, or as many as there are experts for none.
FEW = {
  'one row': (4, 40, 24, [2]),
  'padding, and an idle expert': (3, 6, 10, [2, 3, 0, 0, 3]),
  'nobody': (2, 8, 12, [2, 2]),
  'as many rows as meet weights at once': (6, 24, 20, [5, 1, 3, 1] * 16),
  'rows of no whole tile, columns of several steps': (3, 1024, 384, [1, 1, 0] * 7),
}
KERNELS = {'loop': few.loop, 'visit': functools.partial(few.visit, interpret=True)}


@pytest.mark.parametrize('name', FEW)
@pytest.mark.parametrize('kernel', KERNELS)
def test_few_rows_read_no_other_expert(kernel, name):
  E, D, F, experts = FEW[name]
  x, gate, up, down = draw(0, len(experts), D), draw(1, E, D, F), draw(2, E, D, F), draw(3, E, F, D)
  matrices = [w / np.sqrt(w.shape[1]) for w in (gate, up, down)]
  experts_A = np.array(experts, np.int32)
  wanted = one_hot_ffn(experts_A, x, Weights(tuple(matrices[:2]), matrices[2]))
  for w in matrices:  # what is read of them would show
    w[[expert for expert in range(E) if expert not in experts]] = np.nan
  if name == 'nobody':  # the grid's one step reads an expert, whose rows then count for nothing
    matrices = [np.nan_to_num(w) for w in matrices]
  gate, up, down = map(jnp.asarray, matrices)
  output = jax.jit(KERNELS[kernel])(x, experts_A, Weights((gate, up), down))
  np.testing.assert_allclose(output, wanted, atol=2e-5)
  assert output.dtype == x.dtype


def test_visited_experts_sum_in_float32():
  D, F = 64, 256
  arrays = draw(0, 4, D), draw(1, 3, D, F) / 8, draw(2, 3, D, F) / 8, draw(3, 3, F, D) / 16
  x, gate, up, down = (jnp.asarray(array, jnp.bfloat16) for array in arrays)
  weights = Weights((gate, up), down)
  experts_A = np.array([1, 0, 1, 1], np.int32)
  output = KERNELS['visit'](x, experts_A, weights)
  wanted = one_hot_ffn(experts_A, np.float32(x), jax.tree.map(np.float32, weights))
  assert output.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(output), wanted, atol=0.03)


@pytest.mark.parametrize('kind', ['swiglu', 'geglu_tanh', 'gelu'])
def test_on_tpus_few_rows_are_one_kernel(kind):
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  count = 1 if kind == 'gelu' else 2
  biases = () if kind == 'swiglu' else (array(2, 512),) * count
  weights = Weights((array(2, 256, 512),) * count, array(2, 512, 256), biases, kind)
  run = jax.jit(few.visit)
  traced = run.trace(array(1, 256), jax.ShapeDtypeStruct((1,), jnp.int32), weights)
  text = traced.lower(lowering_platforms=('tpu',)).as_text()
  assert text.count('tpu_custom_call') == 1 and 'visited_experts' in text


# Other FFNs than SwiGLU, and biases.


@pytest.mark.parametrize('kind', ['geglu_tanh', 'gelu'])
@pytest.mark.parametrize('usual', [None, 9, 20], ids=['blocks', 'full', 'usual'])
def test_other_ffns_with_biases_agree_with_one_hot(kind, usual, monkeypatch):
  monkeypatch.setattr(grouped, 'BLOCK_ROWS', {'cpu': 4})
  experts_A = np.array([0, 2, 3, 2, 2] * 3 + [1, 2, 2, 3, 2], np.int32)
  blocks = lambda experts_A, x, weights: grouped.ffn(x, experts_A, weights, 3, 'cpu')
  run = functools.partial(two_buffers, usual) if usual else blocks
  want = with_gradients(one_hot_ffn, experts_A, kind=kind)
  assert_near(jax.jit(functools.partial(with_gradients, run, kind=kind))(experts_A), want, 5e-6)


@pytest.mark.parametrize('kind', ['geglu_tanh', 'gelu'])
@pytest.mark.parametrize('kernel', KERNELS)
def test_few_rows_of_other_ffns(kernel, kind):
  experts_A, x, weights = (
    np.array([2, 3, 0, 0, 3], np.int32),
    draw(0, 5, D),
    weights_of(3, kind=kind),
  )
  output = jax.jit(KERNELS[kernel])(x, experts_A, weights)
  np.testing.assert_allclose(output, one_hot_ffn(experts_A, x, weights), rtol=1e-5, atol=1e-4)
