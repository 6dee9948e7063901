"""Stands in for `gcloud` where the real client is not: the commands that launch/ uses, no others.

It takes the flags of Google Cloud SDK 528 for these commands and refuses all else, as the real
client does (test_real_gcloud.py compares the two), records every call, and changes the cloud in
$STAND_IN. `ssh` and `scp` reach the workers' homes.
"""

import argparse
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

# By command: its flags with a value, its flags without one, what else it takes.
CREATE = (
  'node-id node-count node-prefix accelerator-type runtime-version network subnetwork '
  'service-account tags valid-until-duration valid-after-duration labels metadata'
)
COMMANDS = {
  'config get-value': ('', '', 'property'),
  'storage ls': ('', '', 'url'),
  'compute tpus queued-resources create': (
    CREATE, 'spot reserved guaranteed internal-ips async', 'name'
  ),
  'compute tpus queued-resources describe': ('', '', 'name'),
  'compute tpus queued-resources list': ('filter', '', ''),
  'compute tpus queued-resources delete': ('', 'force async', 'name'),
  'compute tpus tpu-vm list': ('filter', '', ''),
  'compute tpus tpu-vm delete': ('', 'async', 'name'),
  'compute tpus tpu-vm ssh': ('worker command ssh-flag', 'internal-ip', 'name'),
  'compute tpus tpu-vm scp': ('worker', 'internal-ip recurse', 'paths'),
}  # fmt: skip
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


def read(arguments: list[str]) -> tuple[str, argparse.Namespace]:
  """The command, and what it is given."""
  command = next((c for c in COMMANDS if arguments[: len(c.split())] == c.split()), None)
  if command is None:
    fail(f"Invalid choice: '{' '.join(arguments[:4])}'.")
  valued, plain, rest = COMMANDS[command]
  parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
  parser.error = fail
  for flag in ('project', 'format', 'zone', *valued.split()):
    parser.add_argument(f'--{flag}', required=flag in ('accelerator-type', 'runtime-version'))
  for flag in ('quiet', *plain.split()):
    parser.add_argument(f'--{flag}', action='store_true')
  if rest:
    parser.add_argument(rest, nargs='+' if rest == 'paths' else None)
  return command, parser.parse_args(arguments[len(command.split()) :])


def main() -> None:
  cloud = clouds.Cloud(os.environ['STAND_IN'])
  with cloud.change() as state:
    state['calls'].append(sys.argv[1:])
    account, project = state['account'], state['project']
  command, args = read(sys.argv[1:])
  if command == 'config get-value':
    print(project)
    return
  if not account:
    fail('You do not currently have an active account selected.\nPlease run: gcloud auth login\n')
  if command == 'storage ls':
    if not is_stored(cloud, args.url.removeprefix('gs://')):
      fail('One or more URLs matched no objects.')
    return
  if not args.zone:
    fail('Error parsing [queued_resource].\nFailed to find attribute [zone].')
  if (args.project or project) != 'proj-1':
    fail(f"PERMISSION_DENIED: Permission denied on resource project '{args.project}'.")
  group, verb = command.split()[2:]
  if verb in ('ssh', 'scp'):
    (ssh if verb == 'ssh' else scp)(cloud, args)
  with cloud.change() as state:
    resources = state['requests' if group == 'queued-resources' else 'nodes']
    if verb == 'create':
      create(state, args)
    elif verb == 'list':
      for key, row in resources.items():
        if key.startswith(f'{args.zone}/') and passes(args.filter, row):
          print(projected(args.format, row))
    elif f'{args.zone}/{args.name}' not in resources:
      fail(f"NOT_FOUND: Resource '{args.name}' was not found.")
    elif verb == 'describe':
      print(projected(args.format, look(cloud, state, args.zone, args.name)))
    elif group == 'queued-resources':
      delete_request(cloud, state, args)
    else:
      cloud.remove_node(state, args.zone, args.name)


def projected(text: str, row: dict[str, Any]) -> str:
  """A row by `value(KEY,…)`: tabs between, empty for what is not there."""
  keys = re.fullmatch(r'value\((.*)\)', text, re.DOTALL)[1].split(',')
  found = [get(key.strip(), row) for key in keys]
  return '\t'.join('' if each is None else str(each) for each in found)


def passes(text: str | None, row: dict[str, Any]) -> bool:
  """Whether a row passes `KEY=VALUE`, or `KEY:*`, which asks that there be one."""
  key, _, wanted = (text or ':*').partition('=')
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


def is_stored(cloud: clouds.Cloud, path: str) -> bool:
  """Whether an object is there: of the test's server of buckets, or of the test's own folder."""
  server = os.environ.get('STORAGE_EMULATOR_HOST')
  if server is None:
    return (cloud.folder / 'buckets' / path).exists()
  bucket, _, name = path.partition('/')
  try:
    urllib.request.urlopen(f'{server}/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, "")}')
  except urllib.error.HTTPError as error:
    if error.code == 404:
      return False
    raise
  return True


def create(state: dict[str, Any], args: argparse.Namespace) -> None:
  if bool(args.node_id) == bool(args.node_count):
    fail('Exactly one of (--node-count | --node-id) must be specified.')
  if args.valid_until_duration and not re.fullmatch(r'(\d+[dhms])+', args.valid_until_duration):
    fail(f'Failed to parse duration [{args.valid_until_duration}]')
  fate = (state['plans'].get(args.zone) or ['active']).pop(0)
  key = f'{args.zone}/{args.name}'
  if fate in REFUSALS:
    fail(REFUSALS[fate])
  if key in state['requests']:
    fail(f"ALREADY_EXISTS: Resource '{args.name}' already exists.")
  node = {'acceleratorType': args.accelerator_type, 'runtimeVersion': args.runtime_version}
  node['labels'] = dict(label.split('=') for label in (args.labels or '').split(',') if label)
  spec = {'node': node}
  if args.node_id:
    spec['nodeId'] = args.node_id
  else:
    several = {'nodeCount': int(args.node_count), 'nodeIdPrefix': args.node_prefix or args.name}
    spec['multisliceParams'] = several
  state['requests'][key] = {
    'name': f'projects/proj-1/locations/{args.zone}/queuedResources/{args.name}',
    'state': {'state': 'CREATING'},
    'tpu': {'nodeSpec': [spec]},
    'future': FUTURES[fate],
    **({'spot': {}} if args.spot else {}),
  }
  state['created'].append(key)


def look(cloud: clouds.Cloud, state: dict[str, Any], zone: str, name: str) -> dict[str, Any]:
  """A request; time passes when somebody looks."""
  request = state['requests'][f'{zone}/{name}']
  if not request['future']:
    return request
  now = request['future'].pop(0)
  request['state'] = {'state': now}
  if now == 'FAILED':
    request['state']['failedData'] = {'error': {'code': 8, 'message': STOCK_OUT}}
  if now == 'ACTIVE':
    spec = request['tpu']['nodeSpec'][0]
    several = spec.get('multisliceParams')
    nodes = [spec.get('nodeId')]
    if several:
      nodes = [f'{several["nodeIdPrefix"]}-{i}' for i in range(several['nodeCount'])]
    kind, size = spec['node']['acceleratorType'].rsplit('-', 1)
    per_host, unit = HOSTS[kind]
    workers = max(1, int(size) // unit // per_host)
    for node in nodes:
      state['nodes'][f'{zone}/{node}'] = spec['node'] | {
        'name': f'projects/proj-1/locations/{zone}/nodes/{node}',
        'state': 'READY',
        'networkEndpoints': [{'port': 8470}] * workers,
        'request': name,
      }
      for worker in range(workers):
        cloud.home(zone, node, worker).mkdir(parents=True)
  return request


def delete_request(cloud: clouds.Cloud, state: dict[str, Any], args: argparse.Namespace) -> None:
  mine = [
    key.split('/')[1]
    for key, node in state['nodes'].items()
    if key.startswith(f'{args.zone}/') and node['request'] == args.name
  ]
  if state['undeletable'] or mine and not args.force:
    state['undeletable'] = max(0, state['undeletable'] - 1)
    fail(f'FAILED_PRECONDITION: Queued resource {args.name} cannot be deleted now.')
  for node in mine:
    cloud.remove_node(state, args.zone, node)
  del state['requests'][f'{args.zone}/{args.name}']


def ssh(cloud: clouds.Cloud, args: argparse.Namespace) -> None:
  processes = [
    subprocess.Popen(
      ['bash', '-c', args.command] if args.command else ['bash', '-l'],
      cwd=home,
      env=clouds.worker_environment(home, worker),
    )
    for worker, home in homes(cloud, args, args.name).items()
  ]
  print('SSH: Attempting to connect to worker 0...', file=sys.stderr)
  codes = [process.wait() for process in processes]
  sys.exit(next((code for code in codes if code), 0))


def scp(cloud: clouds.Cloud, args: argparse.Namespace) -> None:
  *sources, destination = args.paths
  node, colon, folder = destination.partition(':')
  if not colon or not sources:
    fail('the stand-in copies from here to a TPU only')
  for home in homes(cloud, args, node).values():
    for source in sources:
      shutil.copy(source, home / folder / Path(source).name)
  sys.exit()


def homes(cloud: clouds.Cloud, args: argparse.Namespace, name: str) -> dict[int, Path]:
  node = cloud.read()['nodes'].get(f'{args.zone}/{name}')
  if node is None:
    fail(f"NOT_FOUND: Resource '{name}' was not found.")
  if node['state'] == 'PREEMPTED':
    fail('This TPU has terminal state "PREEMPTED", so it cannot be used anymore.')
  count = len(node['networkEndpoints'])
  workers = range(count) if args.worker == 'all' else [int(args.worker or 0)]
  if max(workers) >= count:
    fail(f'Invalid value for [--worker]: worker index {args.worker} is larger than valid.')
  return {worker: cloud.home(args.zone, name, worker) for worker in workers}


if __name__ == '__main__':
  try:
    main()
  except KeyboardInterrupt:
    sys.exit('\n\nCommand killed by keyboard interrupt\n')
