"""The command as a process: its mistakes, and, where the TPU's compiler is, real programs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = '--config=tests/assets/tiny.py'
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="needs the TPU's compiler: pip install 'jax[tpu]'",
)


def run(*flags: str) -> subprocess.CompletedProcess:
  line = [sys.executable, '-m', 'bam_jax.aot', *flags]
  # A platform that is not there: compiling must not ask for it.
  environment = os.environ | {'JAX_PLATFORMS': 'tpu', 'COLUMNS': '100'}
  return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize('flags, sentence', [
  (['--topology=v5e:2x2'], '--run is required'),
  (['--run=seed', '--topology=v9:2x2'], '--topology=v9:2x2 is not CHIP'),
  (['--run=seed', '--topology=v5e:2x2', '--context=99'],
   '--context requires --phase=decode: remove it, or set that phase'),
])  # fmt: skip
def test_a_mistake_is_one_sentence_and_status_2(server, flags, sentence):
  server.run('aot', RECIPE, *flags, folder=ROOT).refused(sentence)


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is not None, reason='libtpu is installed')
def test_without_the_compiler():
  done = run(RECIPE, '--run=seed', '--topology=v5e:2x2')
  assert done.returncode == 2 and "pip install 'jax[tpu]'" in done.stderr


def facts_of(*flags: str) -> dict:
  done = run(*flags, '--json=-')
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


SMALL = '--config=configs/small_590m.py'


@needs_libtpu
@pytest.mark.slow
def test_a_mixture_on_a_slice():
  key = '--config.runs.bam_kv'
  flags = (
    SMALL, '--run=bam_kv', '--topology=v5e:2x4', '--sequences_per_chip=2', f'{key}.mesh.fsdp=2',
    f'{key}.mesh.expert=4', f'{key}.compute.remat=full',
  )  # fmt: skip
  facts = facts_of(*flags)
  assert facts['fits'] and facts['chips'] == 8 and not facts['uncounted_kernels']
  assert 1.0 < facts['flops_ratio'] < 1.4  # the blocks' forward pass twice, the logits' once
  # Nine grouped products a layer of the three weights, and those that are computed again.
  model, rows = 6 * 2 * 3 * 1024 * 2048, facts['batch_size'] * facts['sequence_length']
  assert 3 * model * rows <= facts['compiled_flops']['grouped'] <= 4 * model * rows
  kinds = {(row['kind'], row['axes']) for row in facts['collectives']}
  assert {('all-gather', 'expert'), ('reduce-scatter', 'expert'), ('all-gather', 'fsdp')} <= kinds
  reduced = sum(r['wire_bytes'] for r in facts['collectives'] if r['kind'] == 'all-reduce')
  assert reduced < 0.1e9


@needs_libtpu
@pytest.mark.slow
def test_a_token_of_experts_on_a_slice():
  """Four chips, each with an attention expert: a token reads what it must, at BTX's speed."""
  key, made = '--config.runs', {}
  for run in ('btx', 'bam_kv'):
    mesh = f'{key}.{run}.mesh.expert=4', f'{key}.{run}.mesh.fsdp=1', f'{key}.{run}.mesh.data=1'
    flags = (SMALL, f'--run={run}', '--topology=v5e:2x2', '--phase=decode', '--context=272', *mesh)
    made[run] = facts_of(*flags)
    # Weights of experts that nobody visits are not read, and nothing is read twice.
    assert made[run]['fits'] and made[run]['hbm_ratio'] < 1.1
    assert not made[run]['uncounted_kernels']
    counts = {row['kind']: row['count'] for row in made[run]['collectives']}
    assert counts['all-reduce'] == 7  # six layers, and the embedding
  ratio = made['bam_kv']['seconds']['roofline'] / made['btx']['seconds']['roofline']
  assert ratio < 1.05


@needs_libtpu
@pytest.mark.slow
def test_a_search_compiles_and_ranks():
  flags = (RECIPE, '--run=btx', '--topology=v5e:2x2', '--sequences_per_chip=2', '--search')
  facts = facts_of(*flags)
  times = [row['seconds']['roofline'] for row in facts['candidates'] if row['fits']]
  assert times and times == sorted(times) and facts['candidates'][0]['mesh'] == facts['mesh']
  assert all(flag.startswith('--config.runs.btx.') for flag in facts['flags'])
