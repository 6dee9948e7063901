"""A model on a mesh is the model on one device: its loss, every gradient, and what moves for it."""

import functools
import re
from collections import Counter

import jax
import numpy as np
import pytest

from bam_jax import config
from bam_jax.model import transformer
from bam_jax.model.kernels import grouped
from bam_jax.parallel import sharding
from bam_jax.parallel.collectives import Layout
from bam_jax.train import loss as loss_lib
from bam_jax.train import step
from tests.model import odd

LOSS = config.Loss(load_balance=0.3, router_z=0.2)
TOLERANCE = 1e-5  # of the largest element of each array
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 4, 1), (1, 2, 2, 2), (1, 1, 8, 1)]
ODD = [name for name in odd.MODELS if name != 'with_a_capacity']  # what it drops, the mesh decides
QUICK = {
  ('untied', (1, 2, 2, 2)),
  ('bam_kv_experts', (1, 2, 4, 1)),
  ('bam_shared_kv', (1, 2, 2, 2)),
  ('embedding_experts', (1, 2, 2, 2)),
}


@pytest.fixture(scope='module')
def compiled(named, start, make_batch):
  """The function (name, mesh) -> the compiled gradient of one batch, and its arguments."""

  def build(name: str, shape, compute=config.Compute()):  # noqa: B008
    mesh = sharding.make_mesh(config.Mesh(*shape))
    network = transformer.Network(named(name), compute, mesh)
    params = jax.device_put(start(name), sharding.tree(network.abstract(), mesh))
    batch = sharding.put_batch(make_batch(8, 12, seed=1), mesh)
    gradients = jax.jit(functools.partial(step.gradients, network, LOSS, 1))
    return gradients.lower(params, batch).compile(), (params, batch)

  return build


@pytest.fixture(scope='module')
def one_device(named, start, make_batch):
  """The function name -> loss, metrics and gradients by a jit without any mesh."""

  @functools.cache
  def run(name: str):
    network = transformer.Network(named(name), config.Compute())
    objective = functools.partial(loss_lib.objective, network, LOSS)
    gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))
    return jax.device_get(gradient(start(name), make_batch(8, 12, seed=1)))

  return run


def far(got, want) -> dict[str, float]:
  """The leaves that differ by more than the tolerance, and by how much of the largest element."""
  got, want = jax.device_get(got), jax.device_get(want)
  found = {}
  for path, expected in jax.tree_util.tree_leaves_with_path(want):
    value = functools.reduce(lambda tree, key: _child(tree, key), path, got)
    assert value.shape == expected.shape and value.dtype == expected.dtype
    distance = np.abs(value - expected).max() / (np.abs(expected).max() or 1)
    if not distance < TOLERANCE:
      found[jax.tree_util.keystr(path)] = float(distance)
  return found


def _child(tree, key):
  if isinstance(key, jax.tree_util.GetAttrKey):
    return getattr(tree, key.name)
  return tree[key.key if isinstance(key, jax.tree_util.DictKey) else key.idx]


CASES = odd.cases(
  ODD,
  MESHES,
  QUICK,
  lambda name, shape: shape[2] <= (2 if 'six' in name else 4) or name in ('dense', 'untied'),
)


@pytest.mark.parametrize('name, shape', CASES)
def test_a_mesh_is_one_device(compiled, one_device, name, shape):
  program, arguments = compiled(name, shape)
  assert far(program(*arguments), one_device(name)) == {}


@pytest.mark.parametrize(
  'remat', [*(pytest.param(n, marks=pytest.mark.slow) for n in ('matmuls', 'attention')), 'full']
)
def test_recomputing_changes_nothing(compiled, one_device, remat):
  program, arguments = compiled(
    'bam_shared_kv', (1, 2, 2, 2), config.Compute(remat=remat, loss_chunk=17, unroll=2)
  )
  assert far(program(*arguments), one_device('bam_shared_kv')) == {}


def without_sum(layout, tree, *axes):
  return tree


def without_adding(layout, x):
  rows = x.shape[0] // layout.sizes['expert']
  return jax.lax.dynamic_slice_in_dim(x, rows * jax.lax.axis_index('expert'), rows)


def one_sided(layout, grads):
  return grads


@pytest.mark.parametrize(
  'method, broken',
  [('sum', without_sum), ('reduce_tokens', without_adding), ('gradient_sums', one_sided)],
)
def test_a_reduction_that_is_left_out_is_noticed(compiled, one_device, monkeypatch, method, broken):
  monkeypatch.setattr(Layout, method, broken)
  program, arguments = compiled('bam_kv_experts', (2, 2, 2, 1))
  assert far(program(*arguments), one_device('bam_kv_experts'))


COLLECTIVE = re.compile(
  r'= \S+?\[([\d,]*)\]\S* (all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)\('
)


def collectives_by_loop(text: str, activations: bool = True) -> list[Counter]:
  """Of every loop of a compiled program that has any, its collectives by kind.

  Activations are (rows, 12, 32), as no other array here is; or else all that is not one is counted.
  """
  bodies = set(re.findall(r'body=%?([\w.\-]+)', text))
  found = []
  for computation in re.split(r'\n(?=%|ENTRY)', text):
    if computation.split(' ')[0].lstrip('%') in bodies:
      kinds = Counter(
        kind
        for shape, kind in COLLECTIVE.findall(computation)
        if shape.endswith(',12,32') == activations
      )
      if kinds:
        found.append(kinds)
  return found


@pytest.mark.parametrize(
  'name',
  [
    'bam_kv_experts',
    'btx',
    *(pytest.param(name, marks=pytest.mark.slow) for name in ('six_experts', 'routed_attention')),
  ],
)
def test_a_layer_gathers_once_and_reduces_once(compiled, name):
  program, _ = compiled(name, (1, 2, 2, 1))
  once = {'all-gather': 1, 'reduce-scatter': 1}
  # The loops over layers: forward and backward.
  assert collectives_by_loop(program.as_text()) == [once, once]


@pytest.mark.parametrize('remat, again', [('none', 0), ('auto', 7)])
def test_without_remat_weights_are_gathered_once(compiled, remat, again):
  program, _ = compiled('bam_kv_experts', (1, 2, 2, 1), config.Compute(remat=remat))
  forward, backward = collectives_by_loop(program.as_text(), activations=False)
  # Four matrices of attention, three of the FFN.
  assert (forward['all-gather'], backward['all-gather']) == (7, again)


@pytest.mark.parametrize('remat', ['none', pytest.param('full', marks=pytest.mark.slow)])
def test_devices_whose_rows_do_not_fit_take_the_full_buffer(
  compiled, named, start, make_batch, monkeypatch, remat
):
  """As on TPUs: in one layer all tokens want one expert, and its device alone has too many."""
  ffn = grouped.ffn
  with monkeypatch.context() as patch:
    patch.setattr(grouped, 'ffn', lambda *arguments: ffn(*arguments[:-1], 'tpu'))
    program, (params, batch) = compiled('biased', (1, 2, 4, 1), config.Compute(remat=remat))
  text = program.as_text()
  assert ' conditional(' in text
  crowded = start('biased')
  crowded['blocks']['ffn']['expert_bias'] = np.zeros_like(crowded['blocks']['ffn']['expert_bias'])
  crowded['blocks']['ffn']['expert_bias'][0, 1] = 10
  params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), crowded, params)

  network = transformer.Network(named('biased'), config.Compute())
  objective = functools.partial(loss_lib.objective, network, LOSS)
  want = jax.jit(jax.value_and_grad(objective, has_aux=True))(crowded, make_batch(8, 12, seed=1))
  load_LE = np.asarray(want[0][1].routing.ffn.load)
  assert load_LE[0, 1] == load_LE[0].sum() and (load_LE[1] < load_LE[1].sum()).all()
  assert far(program(params, batch), want) == {}


def test_lines_of_devices_change_nothing(compiled, one_device, monkeypatch):
  """As on TPUs, where an axis that is all of a slice is gathered along one line after the other."""
  monkeypatch.setattr(sharding, 'lines', lambda mesh, axis: (2, 4) if axis == 'fsdp' else (1,))
  program, arguments = compiled('untied', (1, 8, 1, 1))
  text = program.as_text()
  assert 'replica_groups={{0,4},{1,5},{2,6},{3,7}}' in text or '[4,2]<=[2,4]T(1,0)' in text
  assert far(program(*arguments), one_device('untied')) == {}
