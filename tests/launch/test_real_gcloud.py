"""The real `gcloud`, where it is installed, takes every command that launch/ gives the stand-in."""

import json
import os
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

REAL = shutil.which('gcloud')


class Handler(BaseHTTPRequestHandler):
  """The API, which refuses everything; what was asked to be made is remembered."""

  def do_POST(self) -> None:  # noqa: N802
    self.server.asked.append(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
    self.do_GET()

  def do_GET(self) -> None:  # noqa: N802
    error = {'error': {'code': 404, 'status': 'NOT_FOUND', 'message': 'There is nothing.'}}
    self.send_response(404)
    self.send_header('Content-Type', 'application/json')
    self.end_headers()
    self.wfile.write(json.dumps(error).encode())

  do_DELETE = do_GET  # noqa: N815

  def log_message(self, *_) -> None:
    """Says nothing."""


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason='gcloud is not installed')
def test_the_real_client_takes_every_command(tpu, tmp_path):
  create = ['--create-flags=--network=n --internal-ips', '--labels=team=lm', '--capacity=reserved']
  tpu('up', 'one', '--capacity=spot', '--valid-until=4h')
  tpu('run', 'one', '--', 'true')
  tpu('up', 'many', '--slices=2', *create)
  tpu('ls')
  tpu('down', 'one')
  calls = {
    tuple(word.partition('=')[0] for word in call): call for call in tpu.cloud.read()['calls']
  }
  (tmp_path / 'token').write_text('a token')
  with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
      'HOME': str(tmp_path),
      'NO_PROXY': '127.0.0.1',
      'CLOUDSDK_CONFIG': str(tmp_path / 'gcloud'),
      'CLOUDSDK_AUTH_ACCESS_TOKEN_FILE': str(tmp_path / 'token'),
      'CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU': f'http://127.0.0.1:{server.server_port}/',
      'CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK': '1',
      'CLOUDSDK_CORE_DISABLE_USAGE_REPORTING': '1',
    }
    for call in calls.values():
      done = subprocess.run([REAL, *call], env=environment, capture_output=True, text=True)
      # 1: it was understood, and there is nothing; 2: it was not understood.
      assert done.returncode in (0, 1) and 'Traceback' not in done.stderr, (call, done.stderr)
    server.shutdown()
  one, many = [request['tpu']['nodeSpec'][0] for request in server.asked]
  assert one['nodeId'] == 'one' and one['node']['runtimeVersion'] == 'v2-alpha-tpuv5-lite'
  assert many['multisliceParams'] == {'nodeCount': 2, 'nodeIdPrefix': 'many'}
  assert many['node']['labels'] == {'bam_jax': 'many', 'bam_owner': 'some-one', 'team': 'lm'}
