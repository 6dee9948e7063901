"""The Cloud TPU API, version v2, on the loopback interface, for the real `gcloud` client.

It serves what that client asks for the commands of launch/, over `cloud.Cloud`, and the one request
of the Compute Engine API that `ssh` and `scp` make, for keys.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

from tests.launch.cloud import ApiError, Cloud

_PATH = re.compile(
  r'/v2/projects/([^/]+)/locations/([^/]+)/(queuedResources|nodes|operations)(?:/([^/:]+))?(:\w+)?'
)


class Server:
  """A `with` block's time of service; `url` is where."""

  def __init__(self, cloud: Cloud):
    handler = type('Handler', (_Handler,), {'cloud': cloud})
    self._server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    self.url = f'http://127.0.0.1:{self._server.server_port}'

  def __enter__(self) -> 'Server':
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._server.shutdown()
    self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
  cloud: Cloud

  def _answer(self) -> None:
    length = int(self.headers.get('Content-Length') or 0)
    body = json.loads(self.rfile.read(length)) if length else {}
    url = urlparse(self.path)
    query = {key: values[0] for key, values in parse_qs(url.query).items()}
    try:
      status, answer = 200, self._serve(url.path, query, body)
    except ApiError as error:
      status = error.status
      answer = {'error': {'code': status, 'status': error.code, 'message': error.message}}
    text = json.dumps(answer).encode()
    self.send_response(status)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(text)))
    self.end_headers()
    self.wfile.write(text)

  do_GET = do_POST = do_DELETE = do_PATCH = _answer  # noqa: N815

  def _serve(self, path: str, query: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:
    if path.startswith('/compute/v1/projects/'):
      return {'name': path.rsplit('/', 1)[-1], 'commonInstanceMetadata': {'items': []}}
    match = _PATH.fullmatch(path)
    if not match:
      raise ApiError('NOT_FOUND', f'no such method: {self.command} {path}')
    project, zone, kind, name, verb = match.groups()
    where = project, zone
    done = {
      'name': f'projects/{project}/locations/{zone}/operations/operation-1',
      'done': True,
      'response': {'name': path.removeprefix('/v2/')},
    }
    match self.command, kind, name is not None, verb:
      case 'POST', 'queuedResources', False, None:
        self.cloud.create_request(*where, query['queuedResourceId'], body)
        return done
      case 'GET', 'queuedResources', True, None:
        return self.cloud.get_request(*where, name)
      case 'GET', 'queuedResources', False, None:
        return {'queuedResources': self.cloud.list_requests(*where)}
      case 'DELETE', 'queuedResources', True, None:
        self.cloud.delete_request(*where, name, query.get('force', '').lower() == 'true')
        return done
      case 'GET', 'nodes', True, None:
        return self.cloud.get_node(*where, name)
      case 'GET', 'nodes', False, None:
        return {'nodes': self.cloud.list_nodes(*where)}
      case 'DELETE', 'nodes', True, None:
        self.cloud.delete_node(*where, name)
        return done
      case 'PATCH', 'nodes', True, None:  # an SSH key
        return done
      case 'GET', 'operations', True, None:
        return done
    raise ApiError('NOT_FOUND', f'not served: {self.command} {path}')

  def log_message(self, *_: Any) -> None:
    """Says nothing."""
