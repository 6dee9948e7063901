"""Names of topologies, and what their chips can do."""

import importlib.util

import pytest
from jax.experimental.pallas import tpu as pltpu

from bam_jax.aot import topology
from bam_jax.errors import UserError


def test_a_topology():
  target = topology.parse('v5p:4x4x8', slices=2)
  assert target.chip.name == 'v5p' and target.shape == (4, 4, 8) and target.size == 256


@pytest.mark.parametrize(
  'name, sentence',
  [
    ('v5e', 'is not CHIP:SIZES'),
    ('v7x:2x2', 'CHIP one of v4, v5e, v5p, v6e'),
    ('v5e:4*4', 'is not CHIP:SIZES'),
    ('v5e:4x4x4', 'has 3 sizes, and v5e chips form a grid of 2 dimensions'),
    ('v5p:4x4', 'a grid of 3 dimensions'),
    ('v5e:0x4', 'has 2 sizes'),
  ],
)
def test_mistakes(name, sentence):
  with pytest.raises(UserError, match=sentence.replace('*', r'\*')):
    topology.parse(name)


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is not None, reason='libtpu is installed')
def test_without_the_compiler():
  with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]'"):
    topology.parse('v5e:2x2').devices()


@pytest.mark.skipif(
  not hasattr(pltpu, 'get_tpu_info_for_chip'), reason='this JAX does not list the chips'
)
@pytest.mark.parametrize('name', topology.CHIPS)
def test_chips_as_jax_knows_them(name):
  chip = topology.CHIPS[name]
  cores = 2 if name in ('v4', 'v5p') else 1
  version = getattr(pltpu.ChipVersion, f'TPU_{name.upper()}')
  info = pltpu.get_tpu_info_for_chip(version, cores)
  assert chip.flops == pytest.approx(cores * info.bf16_ops_per_second, rel=0.01)
  assert chip.hbm_bandwidth == pytest.approx(cores * info.mem_bw_bytes_per_second, rel=0.15)
  assert 0.9 < chip.hbm_bytes / (cores * info.hbm_capacity_bytes) <= 1
