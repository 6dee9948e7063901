"""Groups of devices in every form in which HLO writes them."""

import pytest

from bam_jax.aot import collectives, hlo

SIZES = dict(data=1, fsdp=4, expert=2, tensor=1)
ALL = [[*range(8)]]
EVERY_SECOND = [[0, 2, 4, 6], [1, 3, 5, 7]]
PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7]]
FAR = [[0, 4], [1, 5], [2, 6], [3, 7]]
MESH = "mesh['data'=1,'fsdp'=4,'expert'=2,'tensor'=1]"
FORMS = {
  'replica_groups={}': (ALL, 'fsdp+expert'),
  'replica_groups={{0,2,4,6},{1,3,5,7}}': (EVERY_SECOND, 'fsdp'),
  'replica_groups=[4,2]<=[8]': (PAIRS, 'expert'),
  'replica_groups=[2,4]<=[4,2]T(1,0)': (EVERY_SECOND, 'fsdp'),
  f"replica_groups={MESH} {{'fsdp','expert'}}": (ALL, 'fsdp+expert'),
  "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}": (FAR, 'fsdp'),
}


def read(opcode: str, attributes: str) -> collectives.Collective | None:
  entry = hlo.parse(
    'ENTRY %main (x: f32[8,24]) -> f32[8,24] {\n'
    '  %x = f32[8,24]{1,0} parameter(0)\n'
    f'  ROOT %y = f32[8,24]{{1,0}} {opcode}(%x), channel_id=1, {attributes}, to_apply=%add\n}}\n'
  )
  return collectives.read(hlo.root(entry), 8)


@pytest.mark.parametrize('text', FORMS)
def test_forms(text):
  groups, axes = FORMS[text]
  found = read('all-reduce', text)
  assert sorted(map(sorted, found.groups.tolist())) == groups
  assert found.axes(SIZES) == axes


def test_pairs():
  found = read('collective-permute', 'source_target_pairs={{0,2},{2,4},{1,1},{4,0}}')
  assert found.groups.tolist() == [[0, 2], [2, 4], [4, 0]]
  assert found.axes(SIZES) == 'fsdp'
  assert found.wire_bytes == 8 * 24 * 4


def test_one_device_sends_nothing_and_an_unknown_form_raises():
  assert read('all-reduce', 'replica_groups=[8,1]<=[8]') is None
  assert read('collective-permute', 'source_target_pairs={{0,0},{1,1}}') is None
  assert read('multiply', 'metadata={}') is None
  for form in ('@mesh {"x"}', f"{MESH} {{'fsdp':(1)2}}"):
    with pytest.raises(ValueError, match='an unknown form'):
      read('all-reduce', f'replica_groups={form}')


SEND = """\
ENTRY %main (x: f32[8,24]) -> f32[8,24] {
  %x = f32[8,24]{1,0} parameter(0)
  %start = token[] after-all()
  %send = (f32[8,24]{1,0}, u32[]{:S(2)}, token[]) send(%x, %start), channel_id=3, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %sent = token[] send-done(%send), channel_id=3
}
"""


def test_slices_send_through_their_hosts():
  found = collectives.read(hlo.parse(SEND)['send'], 8)
  assert found.kind == 'all-reduce' and found.groups.tolist() == FAR
  assert found.axes(dict(data=2, fsdp=4)) == 'data'
  assert found.wire_bytes == 8 * 24 * 4
  other = hlo.parse(SEND.replace('_xla_megascale_transfer_type="ALL_REDUCE"', 'x="y"'))
  assert collectives.read(other['send'], 8) is None
