"""Stands in for `gcloud` where the real client is not: the commands that launch/ uses, no others.

It takes the flags of Google Cloud SDK 528 for these commands and refuses all else, as the real
client does (test_real_gcloud.py compares the two), records every call, and asks `cloud.Cloud` in
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

import cloud as clouds
import projection

DURATION = re.compile(r'P?(\d+d)?T?(\d+h)?(\d+m)?(\d+s)?', re.IGNORECASE)


class Parser(argparse.ArgumentParser):
  def error(self, message):
    fail(self.prog, message)


def fail(command: str, message: str) -> None:
  sys.exit(f'ERROR: ({command}) {message}')


def duration(text: str) -> str:
  if not text or not DURATION.fullmatch(text):
    raise argparse.ArgumentTypeError(f'Failed to parse duration [{text}]')
  return text


def pairs(text: str) -> dict[str, str]:
  parts = [part.partition('=') for part in text.split(',')]
  if not all(key and sign for key, sign, _ in parts):
    raise argparse.ArgumentTypeError(f'Bad syntax for dict arg: [{text}]')
  return {key: value for key, _, value in parts}


def parser_of(command: tuple[str, ...]) -> Parser:
  parser = Parser(prog='.'.join(('gcloud', *command)), allow_abbrev=False, add_help=False)
  add = parser.add_argument
  add('--project')
  add('--quiet', '-q', action='store_true')
  add('--format')
  match command:
    case ('config', 'get-value'):
      add('property', choices=['project'])
    case ('storage', 'ls'):
      add('url')
    case ('compute', 'tpus', 'queued-resources', verb):
      add('--zone')
      if verb != 'list':
        add('name')
      if verb == 'list':
        add('--filter')
      if verb == 'delete':
        add('--force', action='store_true')
        add('--async', action='store_true')
      if verb == 'create':
        which = parser.add_mutually_exclusive_group(required=True)
        which.add_argument('--node-id')
        which.add_argument('--node-count', type=int)
        for flag in ('--accelerator-type', '--runtime-version'):
          add(flag, required=True)
        for flag in ('--node-prefix', '--network', '--subnetwork', '--service-account', '--tags'):
          add(flag)
        for flag in ('--spot', '--reserved', '--guaranteed', '--internal-ips', '--async'):
          add(flag, action='store_true')
        for flag in ('--valid-until-duration', '--valid-after-duration'):
          add(flag, type=duration)
        for flag in ('--labels', '--metadata'):
          add(flag, type=pairs)
    case ('compute', 'tpus', 'tpu-vm', verb):
      add('--zone')
      if verb == 'list':
        add('--filter')
      if verb in ('describe', 'delete'):
        add('name')
      if verb == 'delete':
        add('--async', action='store_true')
      if verb in ('ssh', 'scp'):
        add('--worker', default='0')
        add('--internal-ip', action='store_true')
      if verb == 'ssh':
        add('--command')
        add('--ssh-flag', action='append')
        add('name')
      if verb == 'scp':
        add('--recurse', action='store_true')
        add('paths', nargs='+')
  return parser


COMMANDS = [
  ('config', 'get-value'),
  ('storage', 'ls'),
  *(('compute', 'tpus', 'queued-resources', v) for v in ('create', 'describe', 'list', 'delete')),
  *(('compute', 'tpus', 'tpu-vm', v) for v in ('ssh', 'scp', 'list', 'describe', 'delete')),
]


def main() -> None:
  arguments = sys.argv[1:]
  cloud = clouds.Cloud(os.environ['STAND_IN'])
  with cloud.change() as state:
    state['calls'].append(arguments)
    account, project = state['account'], state['project']
  command = next((c for c in COMMANDS if tuple(arguments[: len(c)]) == c), None)
  if command is None:
    fail('gcloud', f"Invalid choice: '{' '.join(arguments[:4])}'.")
  dotted = '.'.join(('gcloud', *command))
  args = parser_of(command).parse_args(arguments[len(command) :])
  if command == ('config', 'get-value'):
    print(project)
    return
  if not account:
    fail(
      dotted,
      'You do not currently have an active account selected.\nPlease run:\n\n'
      '  $ gcloud auth login\n',
    )
  args.project = args.project or project
  if not args.project:
    fail(dotted, 'The required property [project] is not currently set.')
  if command == ('storage', 'ls'):
    if not is_stored(cloud, args.url.removeprefix('gs://')):
      fail(dotted, 'One or more URLs matched no objects.')
    print(args.url)
    return
  if not args.zone:
    fail(dotted, 'Error parsing [queued_resource].\nFailed to find attribute [zone].')
  try:
    answer = ACTIONS[command[2:]](cloud, args, dotted)
  except clouds.ApiError as error:
    fail(dotted, f'{error.code}: {error.message}. This command is authenticated as {account}.')
  if answer is not None:
    answer = answer if isinstance(answer, list) else [answer]
    if getattr(args, 'filter', None):
      answer = [row for row in answer if projection.passes(args.filter, row)]
    if not args.format:
      fail(dotted, 'the stand-in prints value(...) only')
    for row in answer:
      print(projection.value(args.format, row))


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


def create(cloud: clouds.Cloud, args: argparse.Namespace, dotted: str) -> None:
  if args.node_prefix and not args.node_count:
    fail(dotted, 'Can only specify --node-prefix if --node-count is also specified.')
  if args.node_count is not None and args.node_count <= 1:
    fail(dotted, 'Invalid value for [--node-count]: Node count must be greater than 1')
  spec = {
    'node': {
      'acceleratorType': args.accelerator_type.lower(),
      'runtimeVersion': args.runtime_version,
      'labels': args.labels or {},
    }
  }
  if args.node_id:
    spec['nodeId'] = args.node_id
  else:
    prefix = args.node_prefix or args.name
    spec['multisliceParams'] = {'nodeCount': args.node_count, 'nodeIdPrefix': prefix}
  body = {'tpu': {'nodeSpec': [spec]}}
  if args.spot:
    body['spot'] = {}
  if args.reserved:
    body['reservationName'] = f'projects/{args.project}/locations/{args.zone}/reservations/-'
  if args.valid_until_duration:
    body['queueingPolicy'] = {'validUntilDuration': args.valid_until_duration}
  cloud.create_request(args.project, args.zone, args.name, body)


def ssh(cloud: clouds.Cloud, args: argparse.Namespace, dotted: str) -> None:
  homes = _homes(cloud, args, args.name.split('@')[-1], dotted)
  if len(homes) > 1 and not args.command:
    fail(dotted, 'Invalid value for [--worker]: cannot target multiple workers without --command')
  processes = [
    subprocess.Popen(
      ['bash', '-c', args.command] if args.command else ['bash', '-l'],
      cwd=home,
      env=clouds.worker_environment(home, worker),
    )
    for worker, home in homes.items()
  ]
  print('SSH: Attempting to connect to worker 0...', file=sys.stderr)
  codes = [process.wait() for process in processes]
  sys.exit(next((code for code in codes if code), 0))


def scp(cloud: clouds.Cloud, args: argparse.Namespace, dotted: str) -> None:
  *sources, destination = args.paths
  node, colon, folder = destination.partition(':')
  if not colon or not sources or any(':' in source for source in sources):
    fail(dotted, 'the stand-in copies from here to a TPU only')
  for home in _homes(cloud, args, node, dotted).values():
    if not (home / folder).is_dir():
      print(f'scp: {folder}: No such file or directory', file=sys.stderr)
      sys.exit(1)
    for source in sources:
      shutil.copy(source, home / folder / Path(source).name)


def _homes(
  cloud: clouds.Cloud, args: argparse.Namespace, name: str, dotted: str
) -> dict[int, Path]:
  node = cloud.get_node(args.project, args.zone, name)
  if node['state'] in ('PREEMPTED', 'TERMINATED'):
    fail(dotted, f'This TPU has terminal state "{node["state"]}", so it cannot be used anymore.')
  count = len(node['networkEndpoints'])
  if args.worker == 'all':
    workers = range(count)
  elif not args.worker.isdigit():
    fail(dotted, f'Invalid value for [--worker]: unable to parse worker ID {args.worker}.')
  elif int(args.worker) >= count:
    fail(dotted, f'Invalid value for [--worker]: worker index {args.worker} is larger than valid.')
  else:
    workers = [int(args.worker)]
  return {worker: cloud.home(args.zone, name, worker) for worker in workers}


ACTIONS = {
  ('queued-resources', 'create'): create,
  ('queued-resources', 'describe'): lambda c, a, _: c.get_request(a.project, a.zone, a.name),
  ('queued-resources', 'list'): lambda c, a, _: c.list_requests(a.project, a.zone),
  ('queued-resources', 'delete'): lambda c, a, _: c.delete_request(
    a.project, a.zone, a.name, a.force
  ),
  ('tpu-vm', 'describe'): lambda c, a, _: c.get_node(a.project, a.zone, a.name),
  ('tpu-vm', 'list'): lambda c, a, _: c.list_nodes(a.project, a.zone),
  ('tpu-vm', 'delete'): lambda c, a, _: c.delete_node(a.project, a.zone, a.name),
  ('tpu-vm', 'ssh'): ssh,
  ('tpu-vm', 'scp'): scp,
}

if __name__ == '__main__':
  try:
    main()
  except KeyboardInterrupt:
    sys.exit('\n\nCommand killed by keyboard interrupt\n')
