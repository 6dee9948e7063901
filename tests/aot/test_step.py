"""Compiled steps, to train and to decode, and their facts on a topology made up here."""

import dataclasses
import io
import itertools
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import rich.console

from bam_jax import config
from bam_jax.aot import cost, program, report, topology
from bam_jax.errors import UserError
from bam_jax.model import arithmetic
from bam_jax.parallel import sharding

TARGET = topology.parse('v5e:2x4')
SQUARE = topology.parse('v5e:2x2')
DECODE = program.Decode(batch_size=2, context=20, dtype='float32')


@pytest.fixture(scope='module')
def make_job(models):
  """The function (model's name, mesh) -> a job."""

  def make(name: str, **mesh) -> program.Job:
    run = config.Run(
      label='a run', init='scratch', data={'general': 1.0}, tokens=256, batch_size=8,
      schedule=config.Schedule(1e-2, 1), mesh=config.Mesh(**mesh),
    )  # fmt: skip
    return program.Job(name, models[name], run, 16)

  return make


def as_tpus(mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> SimpleNamespace:
  """The mesh with chips of a grid in place of its devices."""
  chips = [SimpleNamespace(coords=(*place, 0)) for place in itertools.product(*map(range, shape))]
  devices = np.array(chips[: mesh.size]).reshape(mesh.devices.shape)
  return SimpleNamespace(devices=devices, shape=mesh.shape)


def decoded(job: program.Job) -> dict:
  """The facts of a decode step compiled for the CPU, as if its devices were TPUs."""
  target = dataclasses.replace(SQUARE, shape=(job.run.mesh.size // 2 or 1,) * 2)
  mesh = program.make_mesh(job, jax.devices()[: job.run.mesh.size], target)
  decoder = program.make_decoder(job, DECODE, mesh)
  compiled = program.compile_decode(decoder, DECODE, mesh)
  return report.decode_facts(job, DECODE, target, as_tpus(mesh, (2, 2)), decoder, compiled)


@pytest.fixture(scope='module')
def trained(make_job):
  """A job, its mesh, what was compiled for the CPU, and its facts as if its devices were TPUs."""
  job = make_job('bam_kv_experts', fsdp=2, expert=2, data=2)
  mesh = sharding.make_mesh(job.run.mesh, jax.devices())
  compiled = program.compile_train(job, mesh)
  return job, mesh, compiled, report.train_facts(job, TARGET, as_tpus(mesh, (2, 4)), compiled)


@pytest.fixture(scope='module')
def token(make_job):
  return decoded(make_job('bam_kv_experts', expert=4))


def test_facts_are_json_and_help_names_every_key(trained, token, command_doc):
  words = set(re.findall(r'\w+', command_doc('aot')))
  for facts in (trained[-1], token):
    assert json.loads(json.dumps(facts)) == facts
    assert facts.keys() <= words
    for key in ('memory', 'seconds', 'compiled_flops'):
      assert facts[key].keys() - {'grouped', 'attention'} <= words
    assert facts['collectives'] and all(row.keys() <= words for row in facts['collectives'])
  assert token['needed_bytes'].keys() <= words


def test_facts_agree_with_each_other(trained, token):
  job, *_, facts = trained
  seconds, peak = facts['seconds'], facts['chips'] * TARGET.chip.flops
  flops = arithmetic.training_flops(job.model, 16) * facts['batch_size'] * 16
  assert facts['model_flops'] == flops
  assert seconds['compute'] == pytest.approx(facts['compiled_flops']['total'] / peak)
  assert seconds['hbm'] == pytest.approx(facts['hbm_bytes'] / TARGET.chip.hbm_bandwidth)
  assert seconds['roofline'] <= seconds['in_order'] <= seconds['no_overlap']
  assert seconds['roofline'] == max(seconds['compute'], seconds['hbm'], *seconds['wire'].values())
  assert facts['mfu']['in_order'] == pytest.approx(flops / (peak * seconds['in_order']))
  total = sum(seconds['wire'].values())
  assert total == pytest.approx(sum(row['seconds'] for row in facts['collectives']))
  assert facts['peak_bytes'] + facts['headroom_bytes'] == facts['hbm_limit_bytes']
  # 32 slots, all of them seen: the arithmetic counts half of a context.
  flops = DECODE.batch_size * arithmetic.forward_flops(job.model, 2 * 32)
  assert token['slots'] == 32 and token['model_flops'] == flops
  assert token['hbm_ratio'] == token['hbm_bytes'] / sum(token['needed_bytes'].values())
  speed = DECODE.batch_size / token['seconds']['roofline']
  assert token['tokens_per_second']['roofline'] == speed


def shown(facts: dict) -> str:
  text = io.StringIO()
  rich.console.Console(file=text, width=200).print(*report.tables(facts))
  return text.getvalue()


def test_a_step_that_does_not_fit(make_job):
  message = (
    'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory '
    'required for HLO temporaries (20.25G) exceeds available HBM (15.75G). HLO module: jit_step. '
    'See https://openxla.org/xla/errors/error_1000 for more details.'
  )

  def refuse():
    raise jax.errors.JaxRuntimeError(message)

  job = make_job('btx', data=4)
  refused = program.compile_lowered(SimpleNamespace(compile=refuse))
  assert refused.startswith('Ran out of memory on HBM') and '20.25G' in refused
  facts = report.train_facts(job, TARGET, None, refused)
  assert not facts['fits'] and facts['peak_bytes'] is None
  assert all(word in shown(facts) for word in ('does not fit', 'hbm_limit_bytes', 'jit_step'))


def flops_of(job: program.Job) -> float:
  """Of one device."""
  mesh = sharding.make_mesh(job.run.mesh)
  text = program.compile_train(job, mesh).as_text()
  return sum(cost.read(text, job.run.mesh.size).flops().values())


@pytest.mark.slow
def test_a_dense_step_is_the_models_flops_and_some_scores(make_job):
  job = make_job('dense')
  one = flops_of(job)
  expected = 8 * 16 * arithmetic.training_flops(job.model, 16)
  assert 1 <= one / expected < 1.1  # both halves of the square, or blocks of it
  assert 1 <= flops_of(make_job('dense', data=2, fsdp=4)) / (one / 8) < 1.02


def test_a_token_is_a_part_of_a_call(token, make_job):
  layers = make_job('bam_kv_experts').model.num_layers
  counts = {row['kind']: row['count'] for row in token['collectives']}
  assert counts == {'all-reduce': layers + 1, 'all-gather': 1}


@pytest.mark.slow
def test_a_dense_token_costs_the_models_flops(make_job):
  facts = decoded(make_job('dense'))
  assert facts['flops_ratio'] == 1
  assert 1 <= facts['hbm_ratio'] < 2  # activations weigh as much as weights in so small a model


def test_what_must_be_read(make_job):
  def needed(name, batch=2, **mesh):
    job, decode = make_job(name, **mesh), dataclasses.replace(DECODE, batch_size=batch)
    made = sharding.make_mesh(job.run.mesh, jax.devices()[: job.run.mesh.size])
    return program.needed_bytes(program.make_decoder(job, decode, made), decode)

  for name in ('btx', 'bam_kv_experts', 'bam_shared_kv'):
    model = make_job(name).model
    # Four rows of one assignment each may visit all four experts.
    weights = arithmetic.total_parts(model)
    assert needed(name, 4)['weights'] == needed(name, 8)['weights'] == 4 * weights.total
    assert needed(name, 1)['weights'] == 4 * (weights.total - 3 * weights.ffn // 4)
    assert needed(name)['cache'] == 2 * 32 * arithmetic.cache_bytes(model, 'float32')
  # An attention expert, its cache, and a quarter of the rest, but for norms and routers.
  whole, part = needed('bam_kv_experts'), needed('bam_kv_experts', expert=4)
  parts = arithmetic.total_parts(make_job('bam_kv_experts').model)
  everywhere = 4 * (parts.norms + parts.routers)
  assert part['weights'] - everywhere == (whole['weights'] - everywhere) / 4
  assert part['cache'] == whole['cache'] / 4
  # An input embedding of its own is hardly read.
  assert needed('untied')['weights'] == needed('dense')['weights']


@pytest.mark.parametrize('mesh, batch, sentence', [
  ({'expert': 2}, 2, r'config.runs.btx.mesh has 2 devices, but --topology=v5e:2x2 has 4'),
  ({'data': 4}, 2, r'--batch_size=2 is not a multiple of the 4 parts .* config.runs.btx.mesh'),
  ({'tensor': 4}, 4, r'config.runs.btx.mesh splits blocks/attention/key of shape'),
])  # fmt: skip
def test_mistakes(make_job, mesh, batch, sentence):
  job, decode = make_job('btx', **mesh), dataclasses.replace(DECODE, batch_size=batch)
  with pytest.raises(UserError, match=sentence):
    made = program.make_mesh(job, jax.devices()[:4], SQUARE)
    program.make_decoder(job, decode, made)
