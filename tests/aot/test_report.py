"""The facts of a step: the whole way from a recipe's run to tables, on a topology made up here."""

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
from bam_jax.aot import program, report, topology
from bam_jax.errors import UserError
from bam_jax.model import arithmetic
from bam_jax.parallel import sharding

MESH = config.Mesh(fsdp=2, expert=2, data=2)
TARGET = topology.parse('v5e:2x4')


@pytest.fixture(scope='module')
def jobs(models):
  """Jobs of two variants under `MESH`."""
  run = config.Run(
    label='a run', init='scratch', data={'general': 1.0}, tokens=256, batch_size=8,
    schedule=config.Schedule(1e-2, 1), mesh=MESH,
  )  # fmt: skip
  names = ('btx', 'bam_kv_experts')
  return {name: program.Job(name, models[name], run, 16) for name in names}


@pytest.fixture(scope='module')
def facts(jobs, tmp_path_factory):
  """What is reported of steps compiled for the CPU, as if its devices were TPUs."""
  places = itertools.product(range(2), range(4))
  chips = [SimpleNamespace(coords=(*place, 0), slice_index=None) for place in places]
  result = {}
  for name, job in jobs.items():
    mesh = sharding.make_mesh(MESH, jax.devices())
    stand_in = SimpleNamespace(
      devices=np.array(chips).reshape(mesh.devices.shape), shape=mesh.shape
    )
    compiled = program.compile_step(job, mesh)
    result[name] = report.facts(job, TARGET, stand_in, compiled)
  return result


def test_facts_are_json_and_help_names_every_key(facts, door_doc):
  words = set(re.findall(r'\w+', door_doc('aot')))
  for one in facts.values():
    assert json.loads(json.dumps(one)) == one
    assert one.keys() <= words
    for key in ('memory', 'seconds', 'compiled_flops'):
      assert one[key].keys() - {'grouped', 'attention'} <= words
    for key in ('collectives', 'loops'):
      assert one[key] and all(row.keys() <= words for row in one[key])


def test_facts_agree_with_each_other(facts, jobs):
  for name, one in facts.items():
    tokens = one['batch_size'] * one['sequence_length']
    flops = arithmetic.training_flops(jobs[name].model, 16) * tokens
    assert one['model_flops'] == flops and one['sequences_per_chip'] == 1
    assert one['flops_ratio'] == one['compiled_flops']['total'] / flops
    seconds, peak = one['seconds'], one['chips'] * TARGET.chip.flops
    assert seconds['compute'] == pytest.approx(one['compiled_flops']['total'] / peak)
    assert seconds['hbm'] == pytest.approx(one['hbm_bytes'] / TARGET.chip.hbm_bandwidth)
    assert seconds['roofline'] <= seconds['in_order'] <= seconds['no_overlap']
    assert seconds['roofline'] == max(seconds['compute'], seconds['hbm'], *seconds['wire'].values())
    for bound in report.BOUNDS:
      assert one['mfu'][bound] == pytest.approx(flops / (peak * seconds[bound]))
    total = sum(seconds['wire'].values())
    assert total == pytest.approx(sum(row['seconds'] for row in one['collectives']))
    assert one['peak_bytes'] + one['headroom_bytes'] == one['hbm_limit_bytes']


def test_a_mixture_gathers_and_reduces_over_its_experts_axis(facts):
  kinds = lambda name: {(row['kind'], row['axes']) for row in facts[name]['collectives']}
  assert {('all-gather', 'expert'), ('reduce-scatter', 'expert')} <= kinds('bam_kv_experts')
  assert ('all-gather', 'fsdp') in kinds('btx')


def test_tables_show_them(facts):
  text = io.StringIO()
  console = rich.console.Console(file=text, width=100)
  for table in report.tables(facts['btx']):
    console.print(table)
  shown = text.getvalue()
  for words in ('data=2 fsdp=2 expert=2', 'MFU', 'all-gather', 'fits', 'roofline', 'GB left'):
    assert words in shown


def test_a_step_that_does_not_fit():
  refused = (
    'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory '
    'required for HLO temporaries (20.25G) exceeds available HBM (15.75G). HLO module: jit_step. '
    'See https://openxla.org/xla/errors/error_1000 for more details.'
  )
  needed, reason = program._shortage(refused)
  assert needed == int(20.25 * 2**30) and reason.startswith('Ran out of memory on HBM')
  run = SimpleNamespace(
    label='', mesh=MESH, compute=config.Compute(), batch_size=16, grad_accum_steps=1
  )  # fmt: skip
  job = program.Job('seed', None, run, 16)
  one = report.facts(job, TARGET, None, program.TooLarge(needed, reason, 1.0))
  assert not one['fits'] and one['headroom_bytes'] == TARGET.chip.hbm_bytes - needed
  text = io.StringIO()
  rich.console.Console(file=text, width=200).print(*report.tables(one))
  assert 'does not fit' in text.getvalue() and 'too much' in text.getvalue()
  assert 'jit_step' in text.getvalue()


def test_what_must_be_known_is_noted(facts):
  one = facts['btx'] | {'uncounted_kernels': ['mine.1'], 'loops': [{'trips': None}]}
  notes = report.notes(one)
  assert any('mine.1' in note for note in notes) and any('counted once' in note for note in notes)
  assert report.notes(facts['btx'] | {'loops': [{'trips': 2}]}) == []


def test_a_mesh_that_does_not_use_all_chips(jobs):
  with pytest.raises(UserError, match=r'config.runs.btx.mesh has 8 devices and v5e:4x4 16'):
    program.make_mesh(jobs['btx'], [None] * 16, 'v5e:4x4')


def test_sequences_a_chip(jobs):
  run = dataclasses.replace(jobs['btx'].run, batch_size=32, grad_accum_steps=2)
  job = dataclasses.replace(jobs['btx'], run=run)
  assert job.sequences_per_chip == 2
  job = program.with_sequences(job, 3)
  assert job.run.batch_size == 24 and job.run.grad_accum_steps == 1 and job.sequences_per_chip == 3
