"""A Cloud TPU service that is a file: queued resources, nodes, zones, and what goes wrong there.

`gcloud_stand_in.py` speaks for it; what tests plan and assert on is in one JSON file, changed under
a lock. Resources have the fields of the API's v2. A worker of a node is a folder, its home;
deleting or preempting a node kills what runs there.
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

# What leads the clients of buckets to a server of a test's own.
BUCKETS = re.compile('STORAGE_EMULATOR_HOST|TENSORSTORE_GCS_|GOOGLE_AUTH_TOKEN_FOR_TESTING|GCSFS_')


class Cloud:
  """The service whose state is in `folder`.

  `plan` says what happens to the requests of a zone, one after the other; then all are met:
    active: after a few looks. waiting: never. stock-out, quota, denied, unavailable: refused at
    once. fails: accepted, and FAILED for want of capacity.
  """

  def __init__(self, folder: str | Path):
    self.folder = Path(folder)
    self.path = self.folder / 'cloud.json'

  @classmethod
  def found(cls, folder: Path) -> 'Cloud':
    """A new one, without resources."""
    cloud = cls(folder)
    state = dict(project='proj-1', account='me@example.com', plans={}, undeletable=0)
    cloud.path.write_text(json.dumps(state | dict(requests={}, nodes={}, calls=[], created=[])))
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
        beside.write_text(json.dumps(state))
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

  def remove_node(self, state: dict[str, Any], zone: str, name: str) -> None:
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
