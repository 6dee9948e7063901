"""The stand-in accepts and refuses what the real `gcloud` does, where that is installed.

The real client asks a server on the loopback interface.
"""

import json
import os
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

import pytest

REAL = shutil.which('gcloud')
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not REAL, reason='gcloud is not installed'),
]
QUEUED, VM = 'compute tpus queued-resources', 'compute tpus tpu-vm'
RUNTIME = '--runtime-version=v2-alpha-tpuv6e'
CREATE = f'{QUEUED} create exp-1 --zone=zone-a --accelerator-type=v6e-8 {RUNTIME}'
ACCEPTED = [
  f'{CREATE} --node-count=2 --node-prefix=exp-1 --spot --valid-until-duration=4h --quiet',
  f'{CREATE} --node-id=exp-1 --reserved --labels=a=b,c=d --network=n --internal-ips --tags=t',
]
REFUSED = [
  f'{CREATE}',
  f'{CREATE} --node-id=exp-1 --node-count=2',
  f'{CREATE} --node-id=exp-1 --valid-until-duration=soon',
  f'{CREATE} --node-id=exp-1 --label=a=b',
  f'{QUEUED} create exp-1 --zone=zone-a {RUNTIME} --node-id=exp-1',
  f'{QUEUED} describe exp-1',
  f'{QUEUED} delete exp-2 --zone=zone-a --quiet',
  f'{VM} ssh exp-2 --zone=zone-a --command=true',
  f'{VM} scp one --zone=zone-a',
]
KEPT = ('acceleratorType', 'runtimeVersion', 'labels')


class Handler(BaseHTTPRequestHandler):
  """Accepts whatever is asked to be made, remembers it, and has nothing else."""

  def do_POST(self) -> None:  # noqa: N802
    self.server.asked.append(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
    place = urlparse(self.path).path.removeprefix('/v2/').removesuffix('/queuedResources')
    self.answer(200, {'name': f'{place}/operations/1', 'done': True, 'response': {'name': place}})

  def do_GET(self) -> None:  # noqa: N802
    missing = {'error': {'code': 404, 'status': 'NOT_FOUND', 'message': 'not found'}}
    self.answer(*((200, {'name': 'it'}) if self.server.asked else (404, missing)))

  do_DELETE = do_GET  # noqa: N815

  def answer(self, status: int, content: dict) -> None:
    self.send_response(status)
    self.send_header('Content-Type', 'application/json')
    self.end_headers()
    self.wfile.write(json.dumps(content).encode())

  def log_message(self, *_) -> None:
    """Says nothing."""


@pytest.fixture
def server():
  with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize('accepted, line', [
  *((True, line) for line in ACCEPTED), *((False, line) for line in REFUSED)
])  # fmt: skip
def test_the_stand_in_does_what_the_real_client_does(
  tmp_path, server, cloud, gcloud, accepted, line
):
  (tmp_path / 'token').write_text('a token')
  environment = os.environ | {
    'HOME': str(tmp_path),
    'NO_PROXY': '127.0.0.1',
    'STAND_IN': str(cloud.folder),
    'CLOUDSDK_CONFIG': str(tmp_path / 'gcloud'),
    'CLOUDSDK_AUTH_ACCESS_TOKEN_FILE': str(tmp_path / 'token'),
    'CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU': f'http://127.0.0.1:{server.server_port}/',
    'CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK': '1',
    'CLOUDSDK_CORE_DISABLE_USAGE_REPORTING': '1',
  }
  for program in (REAL, gcloud / 'gcloud'):
    words = [program, *line.split(), '--project=proj-1']
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == accepted, (program, done.stderr)
  specs = [
    [request['tpu']['nodeSpec'][0] for request in requests]
    for requests in (server.asked, cloud.read()['requests'].values())
  ]
  for spec in sum(specs, []):
    spec.pop('parent', None)
    spec['node'] = {key: spec['node'].get(key) or {} for key in KEPT}
  assert specs[0] == specs[1] and bool(specs[0]) == accepted
