"""Stands in for `gcloud`: the commands that launch/ uses, as `--FLAG=VALUE`, on a `cloud.Cloud`.

It records every call, so that test_real_gcloud.py can ask the real client whether it would take it.
The cloud is in the folder $STAND_IN. `ssh` and `scp` reach the workers' homes.
"""

import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import cloud as clouds

CLOUD = clouds.Cloud(os.environ['STAND_IN'])
# Chips a host, and what the number in an accelerator's name counts for one chip.
HOSTS = {'v4': (4, 2), 'v5p': (4, 2), 'v5litepod': (4, 1), 'v6e': (4, 1)}
STOCK_OUT = 'There is no more capacity in the zone; you can try in another zone.'
# By what a test plans: what a request is answered, or the states it goes through.
REFUSALS = {
  'stock-out': f'RESOURCE_EXHAUSTED: {STOCK_OUT}',
  'quota': "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded.",
  'denied': 'PERMISSION_DENIED: The caller does not have permission.',
  'unavailable': 'UNAVAILABLE: The service is currently unavailable.',
}
FUTURES = {
  'active': ['ACCEPTED', 'PROVISIONING', 'ACTIVE'],
  'waiting': ['WAITING_FOR_RESOURCES'],
  'fails': ['WAITING_FOR_RESOURCES', 'FAILED'],
}


def fail(message: str) -> None:
  sys.exit(f'ERROR: (gcloud) {message}')


def main() -> None:
  words = [word for word in sys.argv[1:] if not word.startswith('--')]
  flags = dict(word[2:].partition('=')[::2] for word in sys.argv[1:] if word.startswith('--'))
  with CLOUD.change() as state:
    state['calls'].append(sys.argv[1:])
    account, project = state['account'], state['project']
  if words == ['config', 'get-value', 'project']:
    print(project)
  elif not account:
    fail('You do not currently have an active account selected.\nPlease run: gcloud auth login\n')
  elif words[:2] == ['storage', 'ls']:
    if not is_stored(words[2].removeprefix('gs://')):
      fail('One or more URLs matched no objects.')
  elif flags['project'] != 'proj-1':
    fail(f"PERMISSION_DENIED: Permission denied on resource project '{flags['project']}'.")
  elif words[2:4] == ['tpu-vm', 'ssh']:
    ssh(words[4], flags)
  elif words[2:4] == ['tpu-vm', 'scp']:
    scp(words[4:], flags)
  else:
    with CLOUD.change() as state:
      change(state, words[2] == 'queued-resources', *words[3:], flags=flags)


def change(
  state: dict[str, Any], queued: bool, verb: str, name: str = '', *, flags: dict[str, str]
) -> None:
  """Does what is asked of a resource of a zone, or of all."""
  zone, resources = flags['zone'], state['requests' if queued else 'nodes']
  if verb == 'create':
    create(state, zone, name, flags)
  elif verb == 'list':
    for key, row in resources.items():
      if key.startswith(f'{zone}/') and passes(flags.get('filter'), row):
        print(projected(flags['format'], row))
  elif f'{zone}/{name}' not in resources:
    fail(f"NOT_FOUND: Resource '{name}' was not found.")
  elif verb == 'describe':
    look(state, zone, name)
    print(projected(flags['format'], resources[f'{zone}/{name}']))
  elif not queued:
    CLOUD.remove_node(state, zone, name)
  else:
    mine = [key.split('/') for key, node in state['nodes'].items() if node['request'] == name]
    mine = [node for where, node in mine if where == zone]
    if state['undeletable'] or mine and 'force' not in flags:
      state['undeletable'] = max(0, state['undeletable'] - 1)
      fail(f'FAILED_PRECONDITION: Queued resource {name} cannot be deleted now.')
    for node in mine:
      CLOUD.remove_node(state, zone, node)
    del resources[f'{zone}/{name}']


def create(state: dict[str, Any], zone: str, name: str, flags: dict[str, str]) -> None:
  fate = (state['plans'].get(zone) or ['active']).pop(0)
  if fate in REFUSALS:
    fail(REFUSALS[fate])
  if f'{zone}/{name}' in state['requests']:
    fail(f"ALREADY_EXISTS: Resource '{name}' already exists.")
  nodes = [flags.get('node-id')]
  if 'node-count' in flags:
    nodes = [f'{flags["node-prefix"]}-{number}' for number in range(int(flags['node-count']))]
  spec = {'acceleratorType': flags['accelerator-type']}
  spec['labels'] = dict(label.split('=') for label in flags['labels'].split(','))
  state['requests'][f'{zone}/{name}'] = {
    'name': f'projects/proj-1/locations/{zone}/queuedResources/{name}',
    'state': {'state': 'CREATING'},
    'tpu': {'nodeSpec': [{'node': spec}]},
    'nodes': nodes,
    'future': FUTURES[fate],
  }
  state['created'].append(f'{zone}/{name}')


def look(state: dict[str, Any], zone: str, name: str) -> None:
  """Time passes when somebody looks at a request."""
  request = state['requests'][f'{zone}/{name}']
  if not request['future']:
    return
  now = request['future'].pop(0)
  request['state'] = {'state': now}
  if now == 'FAILED':
    request['state']['failedData'] = {'error': {'message': STOCK_OUT}}
  if now != 'ACTIVE':
    return
  spec = request['tpu']['nodeSpec'][0]['node']
  kind, size = spec['acceleratorType'].rsplit('-', 1)
  per_host, unit = HOSTS[kind]
  workers = max(1, int(size) // unit // per_host)
  for node in request['nodes']:
    state['nodes'][f'{zone}/{node}'] = spec | {
      'name': f'projects/proj-1/locations/{zone}/nodes/{node}',
      'state': 'READY',
      'networkEndpoints': [{'port': 8470}] * workers,
      'request': name,
    }
    for worker in range(workers):
      CLOUD.home(zone, node, worker).mkdir(parents=True)


def projected(text: str, row: dict[str, Any]) -> str:
  """A row by `value(KEY,…)`: tabs between, empty for what is not there."""
  keys = re.fullmatch(r'value\((.*)\)', text, re.DOTALL)[1].split(',')
  found = [get(key.strip(), row) for key in keys]
  return '\t'.join('' if each is None else str(each) for each in found)


def passes(text: str | None, row: dict[str, Any]) -> bool:
  """Whether a row passes `KEY=VALUE`, or `KEY:*`, which asks that there be one."""
  key, _, wanted = (text or 'name:*').partition('=')
  if key.endswith(':*'):
    return get(key[:-2], row) is not None
  return get(key, row) == wanted


def get(key: str, here: Any) -> Any:
  for step in re.findall(r'\w+(?:\(\))?', key):
    if here is None:
      return None
    if step == 'basename()':
      here = here.rsplit('/', 1)[-1]
    elif step == 'len()':
      here = len(here)
    else:
      here = here[int(step)] if step.isdigit() else here.get(step)
  return here


def is_stored(path: str) -> bool:
  """Whether an object is there: of the test's server of buckets, or of the test's own folder."""
  server = os.environ.get('STORAGE_EMULATOR_HOST')
  if server is None:
    return (CLOUD.folder / 'buckets' / path).exists()
  bucket, _, name = path.partition('/')
  try:
    urllib.request.urlopen(f'{server}/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, "")}')
  except urllib.error.HTTPError as error:
    if error.code == 404:
      return False
    raise
  return True


def ssh(name: str, flags: dict[str, str]) -> None:
  processes = [
    subprocess.Popen(
      ['bash', '-c', flags['command']], cwd=home, env=clouds.worker_environment(home, worker)
    )
    for worker, home in homes(name, flags).items()
  ]
  codes = [process.wait() for process in processes]
  sys.exit(next((code for code in codes if code), 0))


def scp(paths: list[str], flags: dict[str, str]) -> None:
  *sources, destination = paths
  node, _, folder = destination.partition(':')
  for home in homes(node, flags).values():
    for source in sources:
      shutil.copy(source, home / folder / Path(source).name)


def homes(name: str, flags: dict[str, str]) -> dict[int, Path]:
  zone = flags['zone']
  node = CLOUD.read()['nodes'].get(f'{zone}/{name}')
  if node is None:
    fail(f"NOT_FOUND: Resource '{name}' was not found.")
  if node['state'] == 'PREEMPTED':
    fail('This TPU has terminal state "PREEMPTED", so it cannot be used anymore.')
  everyone = range(len(node['networkEndpoints']))
  workers = everyone if flags['worker'] == 'all' else [int(flags['worker'])]
  return {worker: CLOUD.home(zone, name, worker) for worker in workers}


if __name__ == '__main__':
  try:
    main()
  except KeyboardInterrupt:
    sys.exit('\n\nCommand killed by keyboard interrupt\n')
