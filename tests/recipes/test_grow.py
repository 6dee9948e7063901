"""`init={'grow': ...}`: a mixture run and a dense run's expert, on a mesh and in part frozen."""

import json

import numpy as np
import pytest

from bam_jax import checkpoint, config
from bam_jax.errors import UserError
from bam_jax.recipes import graph, runner
from bam_jax.upcycle import growth
from bam_jax.upcycle.merge import run_key
from bam_jax.upcycle.sources import open_checkpoint
from tests.upcycle.memory import values


def grow(**changes) -> dict:
  return {'grow': {'from': 'longer', 'with': 'math', **changes}}


@pytest.fixture
def recipe(recipe_dict) -> dict:
  """A mixture that was trained on, and runs that add one of `math` to it."""
  runs = recipe_dict['runs']
  runs['math'] = runs['law'] | {'data': {'math': 1.0}}
  runs['bam']['init']['upcycle'] |= {'norms': 'fold', 'expert_bias': True}
  runs['longer'] = runs['bam'] | {'init': {'run': 'bam'}}
  runs['grown'] = runs['bam'] | {'init': grow(), 'mesh': {'expert': 2}}
  runs['frozen'] = runs['grown'] | {'init': grow(freeze_old=True)}
  for name, run in runs.items():
    steps = {'seed': 0, 'bam': 0, 'grown': 0, 'frozen': 2}.get(name, 1)
    run |= {'tokens': steps * 8 * 16, 'schedule': run['schedule'] | {'warmup_steps': 0}}
  recipe_dict['evaluation'] = {'batch_size': 8, 'domains': ['law']}
  del runs['btx']
  return recipe_dict


@pytest.mark.slow
def test_a_run_that_grows_a_mixture(recipe, dataset, tmp_path):
  runner.execute(config.parse(recipe), tmp_path, dataset)
  params = lambda name: values(checkpoint.find(tmp_path / name))
  mixture, math = (open_checkpoint(str(tmp_path / name)) for name in ('longer', 'math'))
  before, grown, frozen = params('longer'), params('grown'), params('frozen')
  for name in ('grown', 'frozen'):
    added = growth.add(mixture, math, run_key(0, name)).reader
    for path, after in params(name).items():
      start, axis = added.read(path), after.ndim - 1 if path.endswith('router') else 1
      if name == 'grown':
        np.testing.assert_array_equal(after, start, err_msg=path)
      elif path == 'blocks/ffn/expert_bias':
        assert (after != start).any()
      elif path.endswith('router'):
        assert (np.abs(after - start).max(axis=tuple(range(axis))) > 0).all(), path
      elif before[path].shape != after.shape:
        np.testing.assert_array_equal(after[:, :3], before[path], err_msg=path)
        assert (after[:, 3] != start[:, 3]).mean() > 0.9, path
      else:
        np.testing.assert_array_equal(after, before[path], err_msg=path)
  # The norm of a source is in its expert: `norms='fold'` is remembered over runs that train on.
  norm = math.reader.read('blocks/norm/scale')[:, :, None]
  folded = math.reader.read('blocks/ffn/up') * norm
  np.testing.assert_array_equal(grown['blocks/ffn/up'][:, 3], folded)
  assert frozen.keys() == grown.keys()

  meta, names = checkpoint.read_meta(tmp_path / 'frozen'), ('seed', 'code', 'law', 'math')
  assert (meta.sources, meta.method) == (names, 'bam_kv_experts')
  assert [source.run for source in meta.manifest.sources] == ['longer', 'math']
  assert meta.manifest.grown.experts == (0, 1, 2, growth.NEW)
  assert meta.manifest.grown.manifest == mixture.meta.manifest
  assert meta.manifest.upcycle.norms == 'fold' and meta.manifest.name == 'frozen'
  result = json.loads((tmp_path / 'frozen' / 'result.json').read_text())
  assert (result['kind'], result['sources']) == ('mixture', [*names])


@pytest.mark.parametrize('init, sentence', [
  (grow(**{'from': 'code'}), "grow.from='code' is a dense model, without experts: name a mixture"),
  (grow(**{'with': 'bam'}), "grow.with='bam' is not a dense run of the model that 'longer'"),
  ({'grow': {'from': 'longer'}}, 'init.grow.with is missing'),
])  # fmt: skip
def test_what_cannot_grow(recipe, init, sentence):
  recipe['runs']['grown']['init'] = init
  with pytest.raises(UserError) as caught:
    graph.resolve(config.parse(recipe))
  assert sentence in str(caught.value)


def test_a_mesh_that_no_longer_fits(recipe, dataset):
  recipe['runs']['grown']['mesh'] = {'expert': 8}
  parsed = config.parse(recipe)
  with pytest.raises(UserError, match='runs.grown.mesh splits .* into 8 parts .* do not divide 4'):
    graph.check(parsed, graph.resolve(parsed), dataset, ['grown'])
