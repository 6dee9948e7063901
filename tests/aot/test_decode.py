"""The facts of a decode step: of one token, on a topology made up here."""

import dataclasses
import itertools
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from bam_jax import config
from bam_jax.aot import cost, decode, program, report, topology
from bam_jax.errors import UserError
from bam_jax.generate import generator
from bam_jax.model import arithmetic

TARGET = topology.parse('v5e:2x2')
SHAPE = decode.Shape(batch_size=2, context=20, dtype='float32')


@pytest.fixture(scope='module')
def job(models):
  """The function (model's name, mesh) -> a job."""

  def make(name: str, **mesh) -> program.Job:
    run = config.Run(
      label='a run', init='scratch', data={'general': 1.0}, tokens=256, batch_size=8,
      schedule=config.Schedule(1e-2, 1), mesh=config.Mesh(**mesh),
    )  # fmt: skip
    return program.Job(name, models[name], run, 16)

  return make


def facts_of(job: program.Job, shape: decode.Shape = SHAPE) -> dict:
  """What is reported of a step compiled for the CPU, as if its devices were TPUs."""
  size = job.run.mesh.size
  mesh, decoder = decode.build(job, shape, jax.devices()[:size], 'here')
  chips = [SimpleNamespace(coords=(*place, 0)) for place in itertools.product(range(2), repeat=2)]
  stand_in = SimpleNamespace(
    devices=np.array(chips[:size]).reshape(mesh.devices.shape), shape=mesh.shape
  )
  target = TARGET if size == 4 else dataclasses.replace(TARGET, shape=(1, 1))
  compiled = decode.compile_step(decoder, shape, mesh)
  return decode.facts(job, shape, target, stand_in, decoder, compiled)


@pytest.fixture(scope='module')
def facts(job) -> dict:
  return facts_of(job('bam_kv_experts', expert=4))


def test_facts_are_json_and_help_names_every_key(facts, door_doc):
  assert json.loads(json.dumps(facts)) == facts
  assert facts.keys() | facts['needed_bytes'].keys() <= set(re.findall(r'\w+', door_doc('aot')))


def test_a_token_is_a_sixteenth_of_a_call(facts, job):
  layers = job('bam_kv_experts').model.num_layers
  counts = {row['kind']: row['count'] for row in facts['collectives']}
  assert counts == {'all-reduce': layers + 1, 'all-gather': 1}
  (steps,) = [loop for loop in facts['loops'] if loop['trips'] == generator.MAX_STEPS]
  assert steps['times'] == 1 and steps['source'].endswith('/decode_loop/while')


def test_facts_agree_with_each_other(facts, job):
  model = job('bam_kv_experts').model
  # 32 slots, all of them seen: the arithmetic counts half of a context.
  flops = SHAPE.batch_size * arithmetic.forward_flops(model, 2 * 32)
  assert facts['slots'] == 32 and facts['model_flops'] == flops
  assert facts['flops_ratio'] == facts['compiled_flops']['total'] / flops
  assert facts['hbm_ratio'] == facts['hbm_bytes'] / sum(facts['needed_bytes'].values())
  for bound in report.BOUNDS:
    assert facts['tokens_per_second'][bound] == SHAPE.batch_size / facts['seconds'][bound]


def test_a_dense_token_costs_the_models_flops(job):
  facts = facts_of(job('dense'))
  assert facts['flops_ratio'] == 1
  assert 1 <= facts['hbm_ratio'] < 2  # activations weigh as much as weights in so small a model


def test_what_must_be_read(job):
  def needed(name, batch=2, **mesh):
    shape = dataclasses.replace(SHAPE, batch_size=batch)
    devices = jax.devices()[: config.Mesh(**mesh).size]
    return decode.needed_bytes(decode.build(job(name, **mesh), shape, devices, '')[1], shape)

  for name in ('btx', 'bam_kv_experts', 'bam_shared_kv'):
    model = job(name).model
    # Four rows of one choice each may visit all four experts.
    weights = arithmetic.total_parts(model)
    assert needed(name, 4)['weights'] == needed(name, 8)['weights'] == 4 * weights.total
    assert needed(name, 1)['weights'] == 4 * (weights.total - 3 * weights.ffn // 4)
    assert needed(name)['cache'] == 2 * 32 * arithmetic.cache_bytes(model, 'float32')
  # An attention expert, its cache, and a quarter of the rest, but for norms and routers.
  whole, part = needed('bam_kv_experts'), needed('bam_kv_experts', expert=4)
  parts = arithmetic.total_parts(job('bam_kv_experts').model)
  everywhere = 4 * (parts.norms + parts.routers)
  assert part['weights'] - everywhere == (whole['weights'] - everywhere) / 4
  assert part['cache'] == whole['cache'] / 4
  # An input embedding of its own is hardly read.
  assert needed('untied')['weights'] == needed('dense')['weights']


def test_a_step_that_does_not_fit(job):
  shape, asked = dataclasses.replace(SHAPE, batch_size=8), job('btx', data=4)
  _, decoder = decode.build(asked, shape, jax.devices()[:4], 'here')
  refused = program.TooLarge(17 * 2**30, 'Ran out of memory', 1.0)
  facts = decode.facts(asked, shape, TARGET, None, decoder, refused)
  assert not facts['fits'] and facts['headroom_bytes'] < 0
  (table,) = report.tables(facts)
  assert 'one token of each row' in table.title


MISTAKES = {
  'size': ({'expert': 2}, 2, r'config.runs.btx.mesh has 2 devices and --topology=v5e:2x2 4: set'),
  'rows': ({'data': 4}, 2, r'--batch_size=2 is no multiple of the 4 parts .* config.runs.btx.mesh'),
  'model': ({'tensor': 4}, 4, r'config.runs.btx.mesh cuts blocks/attention/key of shape'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes(job, name):
  mesh, batch, sentence = MISTAKES[name]
  shape = dataclasses.replace(SHAPE, batch_size=batch)
  with pytest.raises(UserError, match=sentence):
    decode.build(job('btx', **mesh), shape, jax.devices()[:4], TARGET.flag)


def test_trips_of_a_loop_that_an_argument_says():
  def run(x, steps):
    with jax.named_scope('mine'):
      x = jax.lax.fori_loop(0, steps, lambda _, x: x @ x, x)
    return jax.lax.fori_loop(0, steps, lambda _, x: x @ x, x)

  x, steps = jax.ShapeDtypeStruct((16, 16), 'float32'), jax.ShapeDtypeStruct((), 'int32')
  text = jax.jit(run).lower(x, steps).compile().as_text()
  call = cost.read(text, 1, trips={'mine': 8})
  assert sorted(loop.trips or 0 for loop in call.loops) == [0, 8]  # the other is counted once
  assert call.flops() == {'matmul': (8 + 1) * 2 * 16**3}
  assert call.part(8).flops() == {'matmul': (1 + 1 / 8) * 2 * 16**3}
