"""`up`, `down` and `ls`: what is made, where, and that nothing is left behind."""

import pytest

from tests.launch.conftest import DEADLINE, interrupt, wait_for


def flags_of_creation(tpu):
  """The flags of each request that was made."""
  calls = [call for call in tpu.cloud.read()['calls'] if call[3:4] == ['create']]
  return [dict(f.lstrip('-').partition('=')[::2] for f in call[5:]) for call in calls]


@pytest.mark.parametrize('kind, accelerator, runtime', [
  ('v5e-16', 'v5litepod-16', 'v2-alpha-tpuv5-lite'),
  pytest.param('v4-32', 'v4-32', 'tpu-ubuntu2204-base', marks=pytest.mark.slow),
])  # fmt: skip
def test_up_asks_for_what_the_api_names_so(tpu, kind, accelerator, runtime):
  done = tpu('up', 'exp-1', f'--type={kind}', '--capacity=spot', '--valid-until=4h')
  assert done.returncode == 0, done.stderr
  (flags,) = flags_of_creation(tpu)
  assert flags == {
    'zone': 'zone-a', 'accelerator-type': accelerator, 'runtime-version': runtime,
    'labels': 'bam_jax=exp-1,bam_owner=some-one', 'node-id': 'exp-1', 'spot': '',
    'valid-until-duration': '4h', 'project': 'proj-1', 'quiet': '',
  }  # fmt: skip
  assert tpu.resources() == ['zone-a/exp-1']
  assert 'costs money until: launch/tpu down exp-1' in done.stderr


@pytest.mark.slow
def test_up_of_several_slices_on_a_reservation_and_down_twice(tpu):
  done = tpu('up', 'many', '--slices=3', '--capacity=reserved', '--labels=team=lm')
  assert done.returncode == 0, done.stderr
  (flags,) = flags_of_creation(tpu)
  assert flags['node-count'] == '3' and flags['node-prefix'] == 'many' and 'reserved' in flags
  assert flags['labels'] == 'bam_jax=many,bam_owner=some-one,team=lm'
  assert tpu.resources() == ['zone-a/many', *(f'zone-a/many-{i}' for i in range(3))]
  assert 'up in zone-a: 3 x v5litepod-8, 6 workers' in done.stderr
  first, second = tpu('down', 'many'), tpu('down', 'many')
  assert (first.returncode, second.returncode) == (0, 0)
  assert tpu.resources() == [] and 'there is no many in zone-a, zone-b' in second.stderr


@pytest.mark.slow
def test_up_twice_makes_one_and_another_type_is_refused(tpu):
  tpu.cloud.plan('zone-a', 'stock-out')
  process = tpu.start('up', 'exp-1', BAM_POLL='0.5')
  wait_for(lambda: tpu.cloud.read()['created'])
  second = tpu('up', 'exp-1')  # while the request is under way
  process.communicate(timeout=DEADLINE)
  assert (process.returncode, second.returncode) == (0, 0), second.stderr
  done = tpu('supervise', 'exp-1', '--delete-on-exit', '--', 'true', BAM_TYPE='v5e-16')
  assert done.returncode == 2
  assert 'exp-1 is a v5litepod-8 in zone-b, not a v5litepod-16' in done.stderr
  assert tpu.cloud.read()['created'] == tpu.resources() == ['zone-b/exp-1']


@pytest.mark.slow
def test_a_request_that_waits_too_long_is_left_for_the_next_zone(tpu):
  tpu.cloud.plan('zone-a', 'waiting')
  done = tpu('up', 'exp-1', BAM_WAIT='5')
  assert done.returncode == 0 and tpu.resources() == ['zone-b/exp-1'], done.stderr


@pytest.mark.slow
def test_up_comes_back_to_a_zone_and_gives_up_without_a_rest(tpu):
  tpu.cloud.plan('zone-a', 'stock-out', 'unavailable', 'fails', 'active')
  tpu.cloud.plan('zone-b', *['quota'] * 9)
  done = tpu('up', 'exp-1', '--rounds=4')
  assert done.returncode == 0, done.stderr
  zones = [flags['zone'] for flags in flags_of_creation(tpu)]
  # Waiting gives no quota; what was away is asked again at once.
  assert zones == ['zone-a', 'zone-b', 'zone-a', 'zone-a', 'zone-a']
  assert tpu('down', 'exp-1').returncode == 0
  tpu.cloud.plan('zone-a', *['stock-out'] * 9)
  done = tpu('up', 'exp-1', '--rounds=3')
  assert done.returncode == 1 and tpu.resources() == []
  assert 'no zone gave exp-1 a v5litepod-8; nothing is left behind' in done.stderr


def test_ctrl_c_in_up_deletes_the_request_and_its_temporary_files(tpu, tmp_path):
  tpu.cloud.plan('zone-a', 'waiting')
  process = tpu.start('up', 'exp-1')
  wait_for(lambda: tpu.cloud.read()['created'])
  code, _, err = interrupt(process)
  assert code == 130 and 'deleted the request for exp-1 in zone-a' in err
  assert tpu.resources() == [] and not any((tmp_path / 'a temporary folder').iterdir())


@pytest.mark.slow
def test_ctrl_c_in_up_leaves_a_request_that_it_did_not_make(tpu):
  tpu.cloud.plan('zone-a', 'waiting')
  first = tpu.start('up', 'exp-1')
  wait_for(lambda: tpu.cloud.read()['created'])
  second = tpu.start('up', 'exp-1')
  wait_for(lambda: second.stderr.readline().endswith('WAITING_FOR_RESOURCES in zone-a\n'))
  assert interrupt(second)[0] == 130 and tpu.resources() == ['zone-a/exp-1']
  assert interrupt(first)[0] == 130 and tpu.resources() == []


@pytest.mark.slow
def test_what_cannot_be_deleted_is_reported(tpu):
  tpu.cloud.plan('zone-a', 'waiting')
  process = tpu.start('up', 'exp-1')
  wait_for(lambda: tpu.cloud.read()['created'])
  tpu.cloud.set(undeletable=99)
  code, _, err = interrupt(process)
  assert code == 130 and tpu.resources() == ['zone-a/exp-1']
  assert 'exp-1 in zone-a COULD NOT BE DELETED and may cost money' in err
  tpu.cloud.set(undeletable=1)
  assert tpu('down', 'exp-1').returncode == 0 and tpu.resources() == []


@pytest.mark.slow
def test_ls_shows_what_has_our_label_and_down_deletes_nodes_without_their_request(tpu):
  tpu('up', 'one')
  tpu('up', 'many', '--slices=2', '--zones=zone-b', '--type=v6e-8')
  with tpu.cloud.change() as state:
    state['requests']['zone-a/other'] = {
      'name': 'projects/proj-1/locations/zone-a/queuedResources/other',
      'state': {'state': 'ACTIVE'},
      'tpu': {'nodeSpec': [{'node': {'acceleratorType': 'v6e-8'}}]},
    }
  rows = lambda: [line.split()[:5] for line in tpu('ls').stdout.splitlines()[1:]]
  one = ['one', 'zone-a', 'v5litepod-8', 'ACTIVE', 'some-one']
  assert rows() == [one, ['many', 'zone-b', 'v6e-8', 'ACTIVE', 'some-one']]
  with tpu.cloud.change() as state:
    del state['requests']['zone-b/many']
  assert rows() == [one, *([f'many-{n}', 'zone-b', 'v6e-8', 'LEAK', 'READY'] for n in (0, 1))]
  assert tpu('down', 'many').returncode == 0
  assert tpu.resources() == ['zone-a/one', 'zone-a/other']
