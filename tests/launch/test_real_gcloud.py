"""The real `gcloud`, where it is installed, against the API on the loopback interface.

What the stand-in accepts and refuses is what the real client does; the verbs work with it.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.api import Server
from tests.launch.conftest import DEADLINE, Launcher, wait_for
from tests.launch.test_run import WAIT, home, started

REAL = shutil.which('gcloud')
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not REAL, reason='gcloud is not installed'),
]
QUEUED, VM = 'compute tpus queued-resources', 'compute tpus tpu-vm'
CREATE = f'{QUEUED} create exp-1 --zone=zone-a --accelerator-type=v6e-8'
RUNTIME = '--runtime-version=v2-alpha-tpuv6e'
ACCEPTED = [
  f'{CREATE} {RUNTIME} --node-id=exp-1 --quiet',
  f'{CREATE} {RUNTIME} --node-count=2 --node-prefix=exp-1 --spot --valid-until-duration=4h',
  f'{CREATE} {RUNTIME} --node-id=exp-1 --reserved --labels=a=b,c=d --network=n --subnetwork=s',
  f'{CREATE} {RUNTIME} --node-id exp-1 --service-account=a@b --internal-ips --tags=t',
]
REFUSED = [
  f'{CREATE} --node-id=exp-1',
  f'{CREATE} {RUNTIME}',
  f'{CREATE} {RUNTIME} --node-id=exp-1 --node-count=2',
  f'{CREATE} {RUNTIME} --node-id=exp-1 --node-prefix=exp',
  f'{CREATE} {RUNTIME} --node-count=1',
  f'{CREATE} {RUNTIME} --node-count=two',
  f'{CREATE} {RUNTIME} --node-id=exp-1 --valid-until-duration=soon',
  f'{CREATE} {RUNTIME} --node-id=exp-1 --labels=a',
  f'{CREATE} {RUNTIME} --node-id=exp-1 --label=a=b',
  f'{CREATE} {RUNTIME} --node-id=exp-1 --preemptible',
  f'{CREATE} {RUNTIME} --node-id=exp-1 --spot --zone',
  f'{QUEUED} create --zone=zone-a --accelerator-type=v6e-8 {RUNTIME} --node-id=exp-1',
  f'{QUEUED} create exp-1 --zone=zone-a {RUNTIME} --node-id=exp-1',
  f'{CREATE} --runtime-version=tpu-ubuntu2204-base --node-id=exp-1',
  f'{QUEUED} describe exp-1 --zone=zone-a --force',
  f'{QUEUED} describe exp-1',
  f'{QUEUED} describe exp-2 --zone=zone-a',
  f'{QUEUED} delete exp-2 --zone=zone-a --quiet',
  f'{QUEUED} delete exp-2 --zone=zone-a --quiet --now',
  f'{QUEUED} list exp-1 --zone=zone-a',
  f'{QUEUED} remove exp-1 --zone=zone-a',
  f'{VM} ssh exp-2 --zone=zone-a --command=true',
  f'{VM} ssh exp-2 --zone=zone-a --command=true --batch-size=4',
  f'{VM} ssh exp-2 --zone=zone-a --workers=all --command=true',
  f'{VM} scp one --zone=zone-a',
  f'{VM} list exp-1 --zone=zone-a',
]


@pytest.fixture
def real(cloud, house, tmp_path):
  """`launch/tpu` with the real client."""
  tools = tmp_path / 'bin'
  tools.mkdir()
  for name in ('ssh', 'scp'):
    program = tools / name
    script = Path(__file__).with_name('ssh_stand_in.py')
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S -E '{script}' {name} \"$@\"\n")
    program.chmod(0o755)
  (tmp_path / 'token').write_text('a token')
  (tmp_path / 'tmp').mkdir()
  launcher = Launcher(cloud, house, tools, tmp_path / 'tmp')
  with Server(cloud) as server:
    launcher.env |= {
      'HOME': str(tmp_path),
      'BAM_PROJECT': 'proj-1',
      'NO_PROXY': '127.0.0.1',
      'CLOUDSDK_CONFIG': str(tmp_path / 'gcloud'),
      'CLOUDSDK_AUTH_ACCESS_TOKEN_FILE': str(tmp_path / 'token'),
      'CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU': f'{server.url}/',
      'CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE': f'{server.url}/compute/v1/',
      'CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK': '1',
      'CLOUDSDK_CORE_DISABLE_USAGE_REPORTING': '1',
    }
    yield launcher


def call(launcher, program, line):
  """Runs gcloud; its exit status and the requests that there are now, which it then forgets."""
  words = [*line.split(), '--project=proj-1']
  done = subprocess.run([program, *words], env=launcher.env, capture_output=True, text=True)
  with launcher.cloud.change() as state:
    made = {
      key: {k: v for k, v in request.items() if k in ('tpu', 'spot', 'reservationName')}
      for key, request in state['requests'].items()
    }
    state['requests'] = {}
  return done.returncode != 0, made, done.stderr


@pytest.mark.parametrize('line', ACCEPTED)
def test_the_stand_in_accepts_what_the_real_client_does(real, gcloud, line):
  refused, made, said = call(real, REAL, line)
  assert not refused, said
  node = made['zone-a/exp-1']['tpu']['nodeSpec'][0]
  for key in ('networkConfig', 'serviceAccount', 'metadata', 'tags'):
    node['node'].pop(key, None)
  node.pop('parent')
  node['node'].setdefault('labels', {})
  assert call(real, gcloud / 'gcloud', line)[:2] == (False, made)


@pytest.mark.parametrize('line', REFUSED)
def test_the_stand_in_refuses_what_the_real_client_does(real, gcloud, line):
  for program in (REAL, gcloud / 'gcloud'):
    refused, made, said = call(real, program, line)
    assert refused and not made, (program, said)
    assert said.startswith(('ERROR: (gcloud', 'ERROR: gcloud')), said


def test_from_up_to_down(real):
  real.cloud.plan('zone-a', 'stock-out')
  done = real('up', 'many', '--slices=2', '--capacity=spot', '--valid-until=4h')
  assert done.returncode == 0, done.stderr
  assert real.resources() == ['zone-b/many', 'zone-b/many-0', 'zone-b/many-1']
  words = ["it's", 'two  spaces', '$HOME "quoted"', '']
  program = 'import os, sys; print(open("words.txt").read() + repr(sys.argv[1:]))'
  done = real('run', 'many', '--', 'python', '-c', program, *words)
  assert done.returncode == 0, done.stderr
  assert done.stdout == f'sent with the commit\n{words!r}\n'
  status = real('status', 'many')
  assert [line.split()[0::2][:2] for line in status.stdout.splitlines()[1:]] == [
    [f'{slice}/{worker}', 'exited'] for slice in range(2) for worker in range(2)
  ]
  listed = real('ls')
  assert [line.split()[:5] for line in listed.stdout.splitlines()[1:]] == [
    ['many', 'zone-b', 'v5litepod-8', 'ACTIVE', 'some-one']
  ]
  done = real('ssh', 'many', '--slice=1', '--worker=1', '--', 'bash', '-c', 'exit 9')
  assert done.returncode == 9
  for _ in range(2):
    assert real('down', 'many').returncode == 0
  assert real.resources() == []


def test_supervise_recreates_after_a_preemption(real):
  process = real.start('supervise', 'exp-1', '--delete-on-exit', '--', 'bash', '-c', WAIT)
  wait_for(lambda: started(real), 120)
  real.cloud.preempt('zone-a', 'exp-1')
  wait_for(lambda: len(real.cloud.read()['created']) == 2 and started(real), 120)
  for worker in range(2):
    (home(real, worker) / 'go').write_text('0')
  _, err = process.communicate(timeout=DEADLINE)
  assert process.returncode == 0, err
  assert 'restart 1 of 10' in err and real.resources() == []


def test_no_credentials(real, tmp_path):
  del real.env['CLOUDSDK_AUTH_ACCESS_TOKEN_FILE']
  done = real('status', 'exp-1')
  assert done.returncode == 2 and 'run gcloud auth login' in done.stderr, done.stderr


def test_no_project(real):
  done = real('status', 'exp-1', BAM_PROJECT='')
  assert done.returncode == 2 and 'Which project?' in done.stderr, done.stderr
