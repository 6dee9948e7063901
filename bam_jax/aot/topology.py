"""TPUs that are not at hand: what the name of a topology stands for, and what its chips can do."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from bam_jax.config.strict import require
from bam_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
  """One chip, which is one JAX device."""

  name: str
  cores: int
  hbm_bytes: int  # that a program may use, as reported by libtpu 0.0.50
  hbm_bandwidth: float  # bytes a second
  link_bandwidth: float  # bytes a second that one link to a neighbour carries each way
  slices_bandwidth: float  # bytes a second each way to other slices, a chip's share of its host's
  dimensions: int  # of the grid of chips
  wraps: int  # dimensions that are a multiple of this are rings, others are lines

  @property
  def flops(self) -> float:
    """Peak FLOP/s in bfloat16."""
    version = getattr(pltpu.ChipVersion, f'TPU_{self.name.upper()}')
    return self.cores * pltpu.get_tpu_info_for_chip(version, self.cores).bf16_ops_per_second


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: HBM and its bandwidth; links are the interconnect's
# bandwidth over the chip's links (v5e 1,600 Gbit/s over 4, v6e 3,200 over 4, v5p 1,200 GB/s both
# ways over 6); between slices a pod's bandwidth over its chips (v5e 6.4, v6e 25.6 Tbit/s over 256),
# for v5p 50 Gbit/s a chip. v4's links: arXiv 2304.01433, 50 GB/s; its bandwidth between slices is
# not published, that of v5p is assumed. JAX's own HBM figures are rounded, for v5p to 2,460 GB/s.
CHIPS = {
  'v4': Chip('v4', 2, int(30.75 * GIB), 1.2e12, 50e9, 6.25e9, dimensions=3, wraps=4),
  'v5e': Chip('v5e', 1, int(15.75 * GIB), 819e9, 50e9, 3.125e9, dimensions=2, wraps=16),
  'v5p': Chip('v5p', 2, int(95.73 * GIB), 2765e9, 100e9, 6.25e9, dimensions=3, wraps=4),
  'v6e': Chip('v6e', 1, int(31.24 * GIB), 1.6e12, 100e9, 12.5e9, dimensions=2, wraps=16),
}
HOST = (2, 2, 1)  # chips of a host along each dimension, where there are as many

# libtpu queries the metadata server, fails and logs it; several processes may compile at once.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


@dataclass(frozen=True)
class Topology:
  """A number of equal slices."""

  name: str  # as in --topology
  chip: Chip
  shape: tuple[int, ...]  # chips of a slice along each dimension
  slices: int

  @property
  def size(self) -> int:
    return self.slices * math.prod(self.shape)

  def devices(self) -> Sequence[Any]:
    """The devices to compile for, slice by slice and host by host, as on the TPU itself.

    UserError when libtpu is missing or does not know the topology.
    """
    missing = f'--topology={self.name} requires the TPU compiler, libtpu, which is not installed'
    require(importlib.util.find_spec('libtpu'), f"{missing}: pip install 'jax[tpu]'.")
    for name, value in _ENVIRONMENT.items():
      os.environ.setdefault(name, value)
    try:
      return topologies.get_topology_desc(
        f'{self.chip.name}:{"x".join(map(str, self.shape))}',
        platform='tpu',
        chips_per_host_bounds=tuple(math.gcd(*pair) for pair in zip(HOST, (*self.shape, 1))),
        chip_config_name='megacore' if self.chip.cores > 1 else 'default',
        **({'num_slices': self.slices} if self.slices > 1 else {}),
      ).devices
    except jax.errors.JaxRuntimeError as error:
      sentence = ' '.join(str(error).split())
      raise UserError(f'--topology={self.name} is refused by libtpu: {sentence}') from None


def parse(name: str, slices: int = 1) -> Topology:
  """The topology of a name such as v5e:4x4 or v5p:4x4x4; UserError for any other."""
  found = re.fullmatch(rf'({"|".join(CHIPS)}):(\d+(?:x\d+)*)', name)
  wrong = f'--topology={name} is not CHIP:SIZES with CHIP one of {", ".join(CHIPS)}'
  require(found, f'{wrong}: for example v5e:4x4 or v5p:4x4x4.')
  chip, shape = CHIPS[found[1]], tuple(int(size) for size in found[2].split('x'))
  wrong = f'--topology={name} has {len(shape)} sizes; {chip.name} chips form a grid of'
  fits = len(shape) == chip.dimensions and 0 not in shape
  require(fits, f'{wrong} {chip.dimensions} dimensions.')
  return Topology(name, chip, shape, slices)
