"""The stand-in accepts and refuses what the real `gcloud` does, where that is installed.

The real client asks a server on the loopback interface, which speaks version v2 of the API
for the same `cloud.Cloud`.
"""

import json
import os
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import pytest

from tests.launch.cloud import ApiError

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


KEPT = ('acceleratorType', 'runtimeVersion', 'labels')
PATH = re.compile(r'/v2/projects/([^/]+)/locations/([^/]+)/(queuedResources|nodes)/?([^/:]*)')


class Handler(BaseHTTPRequestHandler):
  def answer(self) -> None:
    body = json.loads(self.rfile.read(int(self.headers.get('Content-Length') or 0)) or '{}')
    url = urlparse(self.path)
    project, zone, kind, name = PATH.fullmatch(url.path).groups()
    cloud, where, status, answer = self.server.cloud, (project, zone), 200, {}
    try:
      if self.command == 'POST':
        cloud.create_request(*where, parse_qs(url.query)['queuedResourceId'][0], body)
      elif self.command == 'DELETE':
        cloud.delete_request(*where, name, force=True)
      else:
        answer = (cloud.get_node if kind == 'nodes' else cloud.get_request)(*where, name)
    except ApiError as error:
      status = error.status
      answer = {'error': {'code': status, 'status': error.code, 'message': error.message}}
    if self.command != 'GET' and status == 200:
      operation = f'projects/{project}/locations/{zone}/operations/1'
      answer = {'name': operation, 'done': True, 'response': {'name': url.path[4:]}}
    self.send_response(status)
    self.send_header('Content-Type', 'application/json')
    self.end_headers()
    self.wfile.write(json.dumps(answer).encode())

  do_GET = do_POST = do_DELETE = answer  # noqa: N815

  def log_message(self, *_) -> None:
    """Says nothing."""


@pytest.fixture
def environment(cloud, tmp_path):
  """What leads the real client to the server, and the stand-in to the same cloud."""
  (tmp_path / 'token').write_text('a token')
  with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    server.cloud = cloud
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield os.environ | {
      'HOME': str(tmp_path),
      'NO_PROXY': '127.0.0.1',
      'STAND_IN': str(cloud.folder),
      'CLOUDSDK_CONFIG': str(tmp_path / 'gcloud'),
      'CLOUDSDK_AUTH_ACCESS_TOKEN_FILE': str(tmp_path / 'token'),
      'CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU': f'http://127.0.0.1:{server.server_port}/',
      'CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK': '1',
      'CLOUDSDK_CORE_DISABLE_USAGE_REPORTING': '1',
    }
    server.shutdown()


def call(program, line, cloud, environment):
  """Runs a gcloud; whether it refused, what it asked for, and what it said."""
  words = [*line.split(), '--project=proj-1']
  done = subprocess.run([program, *words], env=environment, capture_output=True, text=True)
  with cloud.change() as state:
    made, state['requests'] = state['requests'], {}
  for request in made.values():
    (spec,) = request['tpu']['nodeSpec']
    spec.pop('parent', None)
    spec['node'] = {key: spec['node'].get(key) or {} for key in KEPT}
  kept = ('tpu', 'spot', 'reservationName')
  return done.returncode != 0, {
    name: {key: request[key] for key in kept if key in request} for name, request in made.items()
  }, done.stderr  # fmt: skip


@pytest.mark.parametrize('line', ACCEPTED)
def test_the_stand_in_accepts_what_the_real_client_does(cloud, environment, gcloud, line):
  refused, made, said = call(REAL, line, cloud, environment)
  assert not refused and 'zone-a/exp-1' in made, said
  assert call(gcloud / 'gcloud', line, cloud, environment)[:2] == (False, made)


@pytest.mark.parametrize('line', REFUSED)
def test_the_stand_in_refuses_what_the_real_client_does(cloud, environment, gcloud, line):
  for program in (REAL, gcloud / 'gcloud'):
    refused, made, said = call(program, line, cloud, environment)
    assert refused and not made, (program, said)
    assert said.startswith(('ERROR: (gcloud', 'ERROR: gcloud')), said
