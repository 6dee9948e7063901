"""Every array has a place on the mesh by a rule that names it, the optimizer's beside its own."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.model import transformer
from bam_jax.parallel import sharding
from bam_jax.train import step

MESHES = [(1, 1, 1, 1), (8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 4, 1), (1, 2, 2, 2)]
NOWHERE = {'norm/scale', 'final_norm/scale', 'attention/router', 'ffn/router'}


def abstract(model: config.Model) -> dict:
  return transformer.Network(model, config.Compute()).abstract()


def by_path(tree) -> dict[str, list]:
  """Leaves by the parameter that they belong to; counters are under ''."""
  found = {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    found.setdefault(sharding.path_of(key_path), []).append(leaf)
  return found


def axes(spec: P) -> list[str]:
  return [name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ())]


def test_every_parameter_has_a_rule(model):
  for path, (leaf,) in by_path(abstract(model)).items():
    spec = sharding.spec_of(path, leaf.ndim)
    assert len(set(axes(spec))) == len(axes(spec))
    if path.removeprefix('blocks/') in NOWHERE:
      assert spec == P()
    else:
      # Each large array is cut by all that can cut it.
      assert len(spec) == leaf.ndim and {'fsdp', 'expert', 'tensor'} == set(axes(spec)), path


def test_experts_are_cut_by_the_axis_of_experts(model):
  for path, (leaf,) in by_path(abstract(model)).items():
    _, part, *name = path.split('/')
    experts = {'attention': model.attention_experts, 'ffn': model.ffn_experts}.get(part)
    shared = part == 'attention' and experts and experts.shared_kv and name[0] in ('key', 'value')
    if experts and name != ['router']:
      spec = sharding.spec_of(path, leaf.ndim)
      assert spec[1] == (('fsdp', 'expert') if shared else 'expert'), path


@pytest.mark.parametrize(
  'path, ndim', [('blocks/attention/bias', 3), ('embed', 2), ('blocks/ffn/up', 5), ('', 0)]
)
def test_a_path_without_a_rule_raises(path, ndim):
  with pytest.raises(ValueError, match='No sharding rule'):
    sharding.spec_of(path, ndim)


def test_a_tree_with_an_unknown_array_raises(models):
  params = abstract(models['dense'])
  params['blocks']['attention']['bias'] = jax.ShapeDtypeStruct((2, 32), np.float32)
  with pytest.raises(ValueError, match='blocks/attention/bias'):
    sharding.tree(params, sharding.make_mesh(config.Mesh()))


@pytest.mark.parametrize('shape', MESHES, ids=str)
def test_the_optimizer_lies_beside_the_parameters(model, shape):
  mesh = sharding.make_mesh(config.Mesh(*shape))
  state = step.abstract_state(model, config.Compute(), config.Optimizer(), mesh)
  params, opt_state = by_path(state.params), by_path(state.opt_state)
  counters = opt_state.pop('')
  assert all(leaf.shape == () and leaf.sharding.is_fully_replicated for leaf in counters)
  assert opt_state.keys() == params.keys()
  for path, moments in opt_state.items():
    (leaf,) = params[path]
    assert leaf.sharding == NamedSharding(mesh, sharding.spec_of(path, leaf.ndim))
    assert len(moments) == 2, 'two moments of Adam'
    for moment in moments:
      assert (moment.shape, moment.sharding) == (leaf.shape, leaf.sharding)


@pytest.mark.parametrize('shape', MESHES, ids=str)
def test_large_arrays_are_cut_as_often_as_the_mesh_can(model, shape):
  mesh = sharding.make_mesh(config.Mesh(*shape))
  state = step.abstract_state(model, config.Compute(), config.Optimizer(), mesh)
  for path, (leaf,) in by_path(state.params).items():
    if path.removeprefix('blocks/') in NOWHERE:
      continue
    parts = math.prod(shape[1:])
    assert leaf.size // math.prod(leaf.sharding.shard_shape(leaf.shape)) == parts, path


def test_make_mesh():
  mesh = sharding.make_mesh(config.Mesh(1, 2, 2, 1))
  assert dict(mesh.shape) == {'data': 1, 'fsdp': 2, 'expert': 2, 'tensor': 1}
  assert list(mesh.devices.flat) == jax.devices()[:4]
  with pytest.raises(UserError, match='requires 16 devices, but there are 8'):
    sharding.make_mesh(config.Mesh(16))


def test_check_names_the_array_the_axes_and_the_number(models):
  with pytest.raises(UserError) as caught:
    sharding.check(abstract(models['dense']), config.Mesh(tensor=3), 'config.runs.seed')
  message = str(caught.value)
  for word in ('config.runs.seed.mesh', 'blocks/attention/', '3 parts', 'tensor', 'other mesh'):
    assert word in message
  with pytest.raises(UserError) as caught:
    sharding.check(abstract(models['btx']), config.Mesh(expert=8), 'config.runs.btx')
  message = str(caught.value)
  for word in ('config.runs.btx.mesh', 'blocks/ffn/', '8 parts', 'expert', 'divide 4'):
    assert word in message


def test_batches_are_cut_along_rows(make_batch):
  mesh = sharding.make_mesh(config.Mesh(2, 2, 1, 2))
  batch = make_batch(8, 4)
  for name, array in sharding.put_batch(batch, mesh).items():
    assert array.sharding.shard_shape(array.shape) == (2, 4)
    np.testing.assert_array_equal(array, batch[name])
