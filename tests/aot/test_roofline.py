"""Topologies and their chips; times on links, of groups that lie in different ways on the grid."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from bam_jax.aot import roofline, topology
from bam_jax.aot.collectives import Collective
from bam_jax.errors import UserError

GB = 10**9


def grid(name: str, slices: int = 1) -> roofline.Network:
  """A network whose devices are numbered with the first dimension slowest, slice by slice."""
  target = topology.parse(name, slices)
  devices = [
    SimpleNamespace(coords=(*coords, 0), slice_index=number)
    for number in range(slices)
    for coords in itertools.product(*map(range, target.shape))
  ]
  return roofline.Network(target, devices)


def seconds(net: roofline.Network, kind: str, *groups: tuple[int, ...], size: int = GB):
  return net.seconds(Collective(kind, size, np.array(groups)))


LINK = 50e9  # of v5e, each way


@pytest.mark.parametrize('group, bandwidth', [
  ((0, 1, 2, 3), LINK), ((0, 4, 8, 12), LINK),  # a line: its ends have one link
  ((0, 1, 4, 5), 2 * LINK), (tuple(range(16)), 2 * LINK),  # squares
])  # fmt: skip
def test_a_gather_on_a_grid(group, bandwidth):
  inside, between = seconds(grid('v5e:4x4'), 'all-gather', group)
  assert inside == pytest.approx((len(group) - 1) * GB / bandwidth) and between == 0


def test_long_dimensions_are_rings():
  line, ring = grid('v5e:8x8'), grid('v5e:16x16')
  assert line.bandwidth([*range(8)]) == LINK and ring.bandwidth([*range(16)]) == 2 * LINK
  cube = grid('v5p:4x4x4')
  assert cube.bandwidth([*range(4)]) == 2 * 100e9
  assert cube.bandwidth([*range(16)]) == 4 * 100e9
  assert cube.bandwidth([*range(64)]) == 6 * 100e9
  assert grid('v5p:2x2x2').bandwidth([*range(8)]) == 3 * 100e9  # two chips have one link


def test_between_slices():
  net, everyone = grid('v5e:2x2', slices=3), tuple(range(12))
  slow, fast = 3.125e9, 2 * LINK
  # Gather: each device takes 2 peers' parts over the network, and passes 3 parts on to 3 others.
  inside, between = seconds(net, 'all-gather', everyone)
  assert between == pytest.approx(2 * GB / slow) and inside == pytest.approx(9 * GB / fast)
  # Reduce: a quarter of the sum crosses, 4/3 times for three slices.
  inside, between = seconds(net, 'all-reduce', everyone)
  assert between == pytest.approx(GB / 4 * 4 / 3 / slow)
  assert inside == pytest.approx(GB * 3 / 2 / fast)
  # Everyone to everyone: 8 of 12 parts go to other slices.
  inside, between = seconds(net, 'all-to-all', everyone)
  assert between == pytest.approx(GB * 8 / 12 / slow)
  assert inside == pytest.approx(GB * 3 / 12 / fast)
  # Replicas that lie one in each slice send nothing inside.
  assert seconds(net, 'all-reduce', (0, 4, 8)) == (0.0, pytest.approx(GB * 4 / 3 / slow))


@pytest.mark.parametrize('name, sentence', [
  ('v5e', 'is not CHIP:SIZES'), ('v7x:2x2', 'CHIP one of v4, v5e, v5p, v6e'),
  ('v5e:4*4', 'is not CHIP:SIZES'), ('v5p:4x4', 'a grid of 3 dimensions'),
  ('v5e:4x4x4', 'has 3 sizes; v5e chips form a grid of 2 dimensions'), ('v5e:0x4', 'has 2 sizes'),
])  # fmt: skip
def test_mistakes(name, sentence):
  assert topology.parse('v5p:4x4x8', slices=2).size == 256
  with pytest.raises(UserError, match=sentence.replace('*', r'\*')):
    topology.parse(name)


@pytest.mark.parametrize('name', topology.CHIPS)
def test_chips_as_jax_knows_them(name):
  chip, version = topology.CHIPS[name], getattr(pltpu.ChipVersion, f'TPU_{name.upper()}')
  published = {'v4': 275e12, 'v5e': 197e12, 'v5p': 459e12, 'v6e': 918e12}
  assert chip.flops == pytest.approx(published[name], rel=0.01)
  info = pltpu.get_tpu_info_for_chip(version, chip.cores)
  assert chip.hbm_bandwidth == pytest.approx(chip.cores * info.mem_bw_bytes_per_second, rel=0.15)
  assert 0.9 < chip.hbm_bytes / (chip.cores * info.hbm_capacity_bytes) <= 1
