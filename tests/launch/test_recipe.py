"""`launch/recipe`: the order of the graph, what runs at once, stopping and starting again."""

import signal
from pathlib import Path

import pytest

from tests.launch.conftest import DEADLINE, git, wait_for

GRAPH = 'seed\tseed\t\ncode\tspecialist\tseed\nlaw\tspecialist\tseed'
GRAPH += '\nbam_kv\tmixture\tseed,code,law\nbtx\tmixture\tseed,code,law'
# Stands in for bam_jax.main on a worker: refuses a run whose sources have no result, as the real
# one does; stops when told; trains until its file says how it ends.
TRAINER = r"""
import os, pathlib, signal, sys, time
flags = dict(a[2:].partition('=')[::2] for a in sys.argv[1:])
bucket = pathlib.Path(os.environ['HOME']).parents[2] / 'buckets'
work = bucket / flags['workdir'].removeprefix('gs://')
run = flags['runs']
parents = {'seed': [], 'code': ['seed'], 'law': ['seed']}.get(run, ['seed', 'code', 'law'])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
assert all((work / p / 'result.json').exists() for p in parents), run
(work / run).mkdir(parents=True, exist_ok=True)
print('training', *sys.argv[1:], flush=True)
(work / run / 'begun').touch()
end = work / run / 'end'
while not end.exists():
  time.sleep(0.05)
if end.read_text():
  sys.exit(int(end.read_text()))
(work / run / 'result.json').touch()
"""


@pytest.fixture(scope='module')
def recipe_house(house) -> Path:
  """The house with a graph that is quick to read and a trainer that is quick to train."""
  before = git(house, 'rev-parse', 'HEAD')
  graph = house / 'launch' / 'lib' / 'graph.py'
  graph.write_text(f"""
import subprocess
import sys
if sys.argv[1] != '--config=configs/tiny.py':
  sys.exit('graph.py: there is no such recipe.')
print({GRAPH!r})
""")
  (house / 'bam_jax').mkdir()
  (house / 'bam_jax' / 'main.py').write_text(TRAINER)
  git(house, 'add', '--all')
  git(house, 'commit', '--quiet', '--message=A trainer')
  yield house
  git(house, 'reset', '--quiet', '--hard', before)


@pytest.fixture
def recipe(tpu, recipe_house):
  """Starts `launch/recipe exp` with `tpu`'s cloud."""
  work(tpu).mkdir(parents=True)

  def start(*arguments, config='configs/tiny.py', workdir='gs://bucket/exp', **env):
    flags = [f'--config={config}', f'--workdir={workdir}', *arguments]
    return tpu.start('exp', *flags, program='recipe', **env)

  return start


def work(tpu):
  return tpu.cloud.folder / 'buckets' / 'bucket' / 'exp'


def begun(tpu):
  return sorted(path.parent.name for path in work(tpu).glob('*/begun'))


def end(tpu, *runs, code=''):
  for run in runs:
    (work(tpu) / run).mkdir(exist_ok=True)
    (work(tpu) / run / 'end').write_text(code)


def types(tpu):
  state = tpu.cloud.read()
  return {
    key.split('/')[1]: request['tpu']['nodeSpec'][0]['node']['acceleratorType']
    for key, request in state['requests'].items()
  }


@pytest.mark.slow
def test_a_recipe_from_its_seed_to_its_mixtures(tpu, recipe):
  process = recipe('--mixture-type=v5e-16', '--capacity=spot', '--', '--config.seed=2')
  wait_for(lambda: begun(tpu) == ['seed'])
  assert types(tpu) == {'exp-seed': 'v5litepod-8'}
  end(tpu, 'seed')
  wait_for(lambda: begun(tpu) == ['code', 'law', 'seed'])
  assert types(tpu) == {'exp-code': 'v5litepod-8', 'exp-law': 'v5litepod-8'}
  end(tpu, 'code')
  wait_for(lambda: (work(tpu) / 'code' / 'result.json').exists())
  assert 'btx' not in begun(tpu)
  end(tpu, 'law')
  wait_for(lambda: len(begun(tpu)) == 5)
  assert types(tpu) == {'exp-bam-kv': 'v5litepod-16', 'exp-btx': 'v5litepod-16'}
  assert all('--spot' in call for call in tpu.cloud.read()['calls'] if 'create' in call)
  end(tpu, 'bam_kv', 'btx')
  out, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 0, err
  line = 'training --config=configs/tiny.py --workdir=gs://bucket/exp --runs=law --config.seed=2'
  assert f'[law] {line}\n' in out
  assert err.splitlines()[-1] == ('recipe: all runs are finished: gs://bucket/exp/report/report.md')
  assert tpu.resources() == []


@pytest.mark.slow
def test_stopped_it_deletes_all_and_started_again_it_skips_what_is_finished(tpu, recipe):
  end(tpu, 'seed')
  process = recipe()
  wait_for(lambda: begun(tpu) == ['code', 'law', 'seed'])
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 128 + signal.SIGTERM, err
  assert tpu.resources() == [] and err.count('stopping ') == 2
  end(tpu, 'code', 'law', 'bam_kv', 'btx')
  _, err = recipe('--at-once=1').communicate(timeout=DEADLINE)
  assert 'seed is finished' in err and 'all runs are finished' in err
  assert len(begun(tpu)) == 5 and tpu.resources() == []
  assert tpu.cloud.read()['created'].count('zone-a/exp-seed') == 1


@pytest.mark.slow
def test_a_run_that_fails_takes_its_mixtures_with_it_and_no_other(tpu, recipe):
  end(tpu, 'seed', 'law')
  end(tpu, 'code', code='5')
  process = recipe()
  _, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 1
  assert err.splitlines()[-3:] == [
    'recipe: code: failed (5)',
    'recipe: bam_kv: omitted',
    'recipe: btx: omitted',
  ]
  assert (work(tpu) / 'law' / 'result.json').exists() and tpu.resources() == []


def test_a_dry_run_makes_nothing(tpu, recipe):
  process = recipe('--dry-run', '--specialist-type=v6e-4')
  _, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 0 and tpu.cloud.read()['created'] == []
  assert 'recipe: law: v6e-4 as exp-law, after: seed\n' in err


@pytest.mark.parametrize('arguments, changes, sentence', [
  ([], {'workdir': '/data/exp'}, 'give a gs:// folder, which is all that the TPUs share'),
  ([], {'config': 'no.py'}, 'there is no such recipe'),
  (['--runs=btx'], {}, "--runs has 'btx', which starts from 'seed', and that is not finished"),
  (['--at-once=0'], {}, '--at-once=0 is not a number above 0'),
])  # fmt: skip
def test_mistakes_are_one_sentence(tpu, recipe, arguments, changes, sentence):
  process = recipe(*arguments, **changes)
  out, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 2 and not out
  assert sentence in err and len(err.splitlines()) == 1
  assert tpu.cloud.read()['created'] == []
