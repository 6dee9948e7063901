"""A Cloud TPU service that is a file: queued resources, nodes, zones, and what goes wrong there.

`gcloud_stand_in.py` speaks for it, and a server in `test_real_gcloud.py`; what tests plan
and assert on is in one JSON file, changed under a lock. Resources have the fields of the API's v2.
A worker of a node is a folder, its home; deleting or preempting a node kills what runs there.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = re.compile(r'[a-z]([-a-z0-9]{0,61}[a-z0-9])?')
LABEL_KEY = re.compile(r'[a-z][-_a-z0-9]{0,62}')
LABEL_VALUE = re.compile(r'[-_a-z0-9]{0,63}')
RUNTIMES = {
  'v4': 'tpu-ubuntu2204-base',
  'v5litepod': 'v2-alpha-tpuv5-lite',
  'v5p': 'v2-alpha-tpuv5',
  'v6e': 'v2-alpha-tpuv6e',
}
# Chips a host, and what the number in an accelerator's name counts for one chip.
HOSTS = {'v4': (4, 2), 'v5p': (4, 2), 'v5litepod': (4, 1), 'v6e': (4, 1)}
# What leads the clients of buckets to a server of a test's own.
BUCKETS = re.compile('STORAGE_EMULATOR_HOST|TENSORSTORE_GCS_|GOOGLE_AUTH_TOKEN_FOR_TESTING|GCSFS_')
STOCK_OUT = 'There is no more capacity in the zone "{zone}"; you can try in another zone.'
QUOTA = "Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded. Limit: 0 in zone {zone}."


class ApiError(Exception):
  """What the service refuses: an HTTP status, a canonical code and a sentence."""

  STATUS = {
    'NOT_FOUND': 404,
    'ALREADY_EXISTS': 409,
    'INVALID_ARGUMENT': 400,
    'FAILED_PRECONDITION': 400,
    'PERMISSION_DENIED': 403,
    'RESOURCE_EXHAUSTED': 429,
    'UNAVAILABLE': 503,
  }

  def __init__(self, code: str, message: str):
    super().__init__(message)
    self.code, self.message, self.status = code, message, self.STATUS[code]


class Cloud:
  """The service whose state is in `folder`.

  `plan` says what happens to the requests of a zone, one after the other; then all are met:
    active: after a few looks. waiting: never. stock-out, quota, denied, unavailable: refused at
    once. fails: accepted, and FAILED for want of capacity. bad: accepted, and FAILED for good.
  """

  def __init__(self, folder: str | Path):
    self.folder = Path(folder)
    self.path = self.folder / 'cloud.json'

  @classmethod
  def found(cls, folder: Path, project: str = 'proj-1', account: str = 'me@example.com') -> 'Cloud':
    """A new one, without resources."""
    cloud = cls(folder)
    cloud.path.write_text(
      json.dumps(
        {
          'project': project,
          'account': account,
          'plans': {},
          'denied': False,
          'undeletable': 0,
          'requests': {},
          'nodes': {},
          'calls': [],
          'created': [],
        }
      )
    )
    return cloud

  @contextlib.contextmanager
  def change(self) -> Iterator[dict[str, Any]]:
    """The state, to be read and changed by nobody else meanwhile."""
    with open(self.folder / 'lock', 'w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      state = json.loads(self.path.read_text())
      try:
        yield state
      finally:
        beside = self.path.with_suffix('.partial')
        beside.write_text(json.dumps(state, indent=1))
        beside.replace(self.path)

  def read(self) -> dict[str, Any]:
    with self.change() as state:
      return state

  def set(self, **facts: Any) -> None:
    with self.change() as state:
      state.update(facts)

  def plan(self, zone: str, *fates: str) -> None:
    with self.change() as state:
      state['plans'][zone] = list(fates)

  def home(self, zone: str, node: str, worker: int) -> Path:
    """The home of a worker; short, since tmux keeps its socket there."""
    return self.folder / zone / node / str(worker)

  def preempt(self, zone: str, name: str) -> None:
    """Takes the machines of a request away, as the service does with spot capacity."""
    with self.change() as state:
      state['requests'][f'{zone}/{name}']['state'] = {'state': 'SUSPENDED'}
      for key, node in state['nodes'].items():
        if key.startswith(f'{zone}/') and node['labels'].get('bam_jax') == name:
          node['state'] = 'PREEMPTED'
          self.power_off(zone, key.split('/')[1])

  def power_off(self, zone: str, node: str) -> None:
    """Kills whatever runs on the workers of a node."""
    for home in (self.folder / zone / node).glob('*'):
      environment = worker_environment(home, 0)
      subprocess.run(['tmux', 'kill-server'], env=environment, capture_output=True, check=False)
      for file in home.glob('.bam/run/*/pid'):
        with contextlib.suppress(ProcessLookupError, ValueError):
          os.killpg(int(file.read_text()), signal.SIGKILL)

  def tear_down(self) -> None:
    for home in self.folder.glob('*/*/'):
      self.power_off(home.parent.name, home.name)
    shutil.rmtree(self.folder, ignore_errors=True)

  # What the API offers.

  def create_request(self, project: str, zone: str, name: str, body: dict[str, Any]) -> None:
    with self.change() as state:
      self._admit(state, project)
      fate = (state['plans'].get(zone) or ['active']).pop(0)
      refusals = {
        'stock-out': ('RESOURCE_EXHAUSTED', STOCK_OUT),
        'quota': ('RESOURCE_EXHAUSTED', QUOTA),
        'denied': ('PERMISSION_DENIED', 'The caller does not have permission'),
        'unavailable': ('UNAVAILABLE', 'The service is currently unavailable.'),
      }
      if fate in refusals:
        code, message = refusals[fate]
        raise ApiError(code, message.format(zone=zone))
      if f'{zone}/{name}' in state['requests']:
        raise ApiError('ALREADY_EXISTS', f"Resource '{_path(project, zone, name)}' already exists")
      spec = _check(zone, name, body)
      futures = {
        'active': ['ACCEPTED', 'PROVISIONING', 'ACTIVE'],
        'waiting': ['WAITING_FOR_RESOURCES'],
        'fails': ['WAITING_FOR_RESOURCES', 'FAILED'],
        'bad': ['FAILED'],
      }[fate]
      why = 'The subnetwork does not exist.' if fate == 'bad' else STOCK_OUT.format(zone=zone)
      state['requests'][f'{zone}/{name}'] = {
        'name': _path(project, zone, name),
        'createTime': '2026-11-24T10:00:00.000000Z',
        'state': {'state': 'CREATING'},
        'tpu': {'nodeSpec': [spec]},
        **{key: body[key] for key in ('spot', 'reservationName', 'queueingPolicy') if key in body},
        '_future': futures,
        '_failure': why,
      }
      state['created'].append(f'{zone}/{name}')

  def get_request(self, project: str, zone: str, name: str) -> dict[str, Any]:
    with self.change() as state:
      self._admit(state, project)
      request = self._find(state, 'requests', project, zone, name)
      self._advance(state, project, zone, name, request)
      return _public(request)

  def list_requests(self, project: str, zone: str) -> list[dict[str, Any]]:
    with self.change() as state:
      self._admit(state, project)
      return [
        _public(request) for key, request in state['requests'].items() if key.startswith(f'{zone}/')
      ]

  def delete_request(self, project: str, zone: str, name: str, force: bool) -> None:
    with self.change() as state:
      self._admit(state, project)
      self._find(state, 'requests', project, zone, name)
      if state['undeletable']:
        state['undeletable'] -= 1
        raise ApiError('FAILED_PRECONDITION', f'Queued resource {name} cannot be deleted now.')
      mine = [
        key
        for key, node in state['nodes'].items()
        if key.startswith(f'{zone}/') and node['_request'] == name
      ]
      if mine and not force:
        raise ApiError('FAILED_PRECONDITION', f'Queued resource {name} has nodes; use force.')
      for key in mine:
        self._remove_node(state, zone, key.split('/')[1])
      del state['requests'][f'{zone}/{name}']

  def get_node(self, project: str, zone: str, name: str) -> dict[str, Any]:
    with self.change() as state:
      self._admit(state, project)
      return _public(self._find(state, 'nodes', project, zone, name))

  def list_nodes(self, project: str, zone: str) -> list[dict[str, Any]]:
    with self.change() as state:
      self._admit(state, project)
      return [_public(node) for key, node in state['nodes'].items() if key.startswith(f'{zone}/')]

  def delete_node(self, project: str, zone: str, name: str) -> None:
    with self.change() as state:
      self._admit(state, project)
      self._find(state, 'nodes', project, zone, name)
      self._remove_node(state, zone, name)

  def _admit(self, state: dict[str, Any], project: str) -> None:
    if state['denied'] or project != 'proj-1':
      raise ApiError('PERMISSION_DENIED', f"Permission denied on resource project '{project}'.")

  def _find(
    self, state: dict[str, Any], kind: str, project: str, zone: str, name: str
  ) -> dict[str, Any]:
    try:
      return state[kind][f'{zone}/{name}']
    except KeyError:
      path = _path(project, zone, name)
      if kind == 'nodes':
        path = path.replace('queuedResources', 'nodes')
      raise ApiError('NOT_FOUND', f"Resource '{path}' was not found") from None

  def _advance(
    self, state: dict[str, Any], project: str, zone: str, name: str, request: dict[str, Any]
  ) -> None:
    """Time passes when somebody looks."""
    if not request['_future']:
      return
    now = request['_future'].pop(0)
    request['state'] = {'state': now}
    if now == 'FAILED':
      request['state']['failedData'] = {'error': {'code': 8, 'message': request['_failure']}}
    if now == 'ACTIVE':
      spec = request['tpu']['nodeSpec'][0]
      several = spec.get('multisliceParams')
      names = (
        [f'{several["nodeIdPrefix"]}-{i}' for i in range(several['nodeCount'])]
        if several
        else [spec['nodeId']]
      )
      for node in names:
        self._add_node(state, project, zone, node, name, spec['node'])

  def _add_node(
    self, state: dict[str, Any], project: str, zone: str, name: str, request: str, like: dict
  ) -> None:
    kind, size = like['acceleratorType'].rsplit('-', 1)
    per_host, unit = HOSTS[kind]
    workers = max(1, int(size) // unit // per_host)
    number = len(state['nodes'])
    state['nodes'][f'{zone}/{name}'] = {
      'name': _path(project, zone, name).replace('queuedResources', 'nodes'),
      'acceleratorType': like['acceleratorType'],
      'runtimeVersion': like['runtimeVersion'],
      'labels': like.get('labels', {}),
      'state': 'READY',
      'health': 'HEALTHY',
      'id': str(1000 + number),
      'apiVersion': 'V2',
      'createTime': '2026-11-24T10:01:00.000000Z',
      'networkEndpoints': [
        {'ipAddress': f'10.0.{number}.{worker}', 'port': 8470} for worker in range(workers)
      ],
      '_request': request,
    }
    for worker in range(workers):
      self.home(zone, name, worker).mkdir(parents=True)

  def _remove_node(self, state: dict[str, Any], zone: str, name: str) -> None:
    self.power_off(zone, name)
    shutil.rmtree(self.folder / zone / name, ignore_errors=True)
    del state['nodes'][f'{zone}/{name}']


def worker_environment(home: Path, worker: int) -> dict[str, str]:
  """What a shell on a worker finds: its own home, its own tmux, and the machine's tools."""
  tools = Path(__file__).parent
  return {
    'HOME': str(home),
    'PATH': f'{tools}/worker_tools:{os.environ["PATH"]}:{tools}/tmux_stand_in',
    'TMUX_TMPDIR': str(home),
    'STAND_IN_WORKER': str(worker),
    'STAND_IN_PYTHON': os.environ.get('STAND_IN_PYTHON', 'python3'),
    'JAX_PLATFORMS': 'cpu',
    **{name: value for name, value in os.environ.items() if BUCKETS.match(name)},
  }


def _path(project: str, zone: str, name: str) -> str:
  return f'projects/{project}/locations/{zone}/queuedResources/{name}'


def _public(resource: dict[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in resource.items() if not key.startswith('_')}


def _check(zone: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
  """The node specification of a request, as strict about it as the service."""
  (spec,) = body['tpu']['nodeSpec']
  node = spec['node']
  names = [name, spec.get('nodeId'), spec.get('multisliceParams', {}).get('nodeIdPrefix')]
  for each in filter(None, names):
    if not NAME.fullmatch(each):
      raise ApiError('INVALID_ARGUMENT', f'Invalid resource id {each!r}.')
  kind = node['acceleratorType'].rsplit('-', 1)[0]
  if node['runtimeVersion'] != RUNTIMES.get(kind):
    raise ApiError(
      'INVALID_ARGUMENT',
      f'Accelerator type {node["acceleratorType"]} does not support {node["runtimeVersion"]}.',
    )
  for key, value in node.get('labels', {}).items():
    if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
      raise ApiError('INVALID_ARGUMENT', f'Invalid label {key}={value!r}.')
  if 'spot' in body and 'reservationName' in body:
    raise ApiError('INVALID_ARGUMENT', 'A spot request cannot use a reservation.')
  return spec
