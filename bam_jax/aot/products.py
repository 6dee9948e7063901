"""FLOPs of matrix products in HLO: dots, and the convolutions that TPUs compute them as.

2 for a multiply and add, as in `bam_jax.model.arithmetic`. What is element by element is not
counted: it runs on other units.
"""

import math
import re

import numpy as np

from bam_jax.aot.hlo import Computation, Instruction


def flops(computation: Computation, instruction: Instruction) -> int:
  """FLOPs of one instruction; 0 for one that is no product."""
  match instruction.opcode:
    case 'dot':
      return _dot(computation, instruction)
    case 'convolution':
      return _convolution(computation, instruction)
  return 0


def _dot(computation: Computation, instruction: Instruction) -> int:
  (left,) = computation.operand(instruction, 0).arrays
  contracted = instruction.attribute(r'lhs_contracting_dims=\{([\d,]*)\}')
  depth = math.prod(left.dims[int(dim)] for dim in contracted.split(',') if dim)
  return 2 * instruction.arrays[0].size * depth


def _convolution(computation: Computation, instruction: Instruction) -> int:
  """Only the terms that are not padding: a batched product is a convolution with much of it.

  As XLA's HloCostAnalysis::HandleConvolution counts it.
  """
  (left,), (right,) = (computation.operand(instruction, number).arrays for number in (0, 1))
  labels = instruction.attribute(r'dim_labels=(\S+?)(?:,|$)')
  left_labels, right_labels, out_labels = re.fullmatch(r'(\w+)_(\w+)->(\w+)', labels).groups()
  feature_groups = int(instruction.attribute(r'feature_group_count=(\d+)') or 1)
  batch_groups = int(instruction.attribute(r'batch_group_count=(\d+)') or 1)
  window = instruction.attribute(r'window=\{([^}]*)\}')
  dims = [
    left.dims[left_labels.index('b')] // batch_groups,
    left.dims[left_labels.index('f')] // feature_groups,
    right.dims[right_labels.index('o')],
  ]
  spatial = sorted(label for label in out_labels if label.isdigit())
  for number, label in enumerate(spatial):
    sizes = (
      left.dims[left_labels.index(label)],
      right.dims[right_labels.index(label)],
      instruction.arrays[0].dims[out_labels.index(label)],
    )
    dims.append(_terms(*sizes, *_window(window, number)))
  return 2 * math.prod(dims)


def _window(window: str, number: int) -> tuple[int, int, int, int]:
  """Stride, low padding, and dilation of both sides along one spatial dimension."""
  fields = dict(field.split('=') for field in window.split())

  def value(name: str, default: str) -> str:
    return fields[name].split('x')[number] if name in fields else default

  stride, padding = int(value('stride', '1')), int(value('pad', '0_0').split('_')[0])
  return stride, padding, int(value('lhs_dilate', '1')), int(value('rhs_dilate', '1'))


def _terms(
  left: int,
  right: int,
  out: int,
  stride: int,
  padding: int,
  left_dilation: int,
  right_dilation: int,
) -> int:
  """Pairs of an output's and a window's position that meet an element and not padding."""
  positions = stride * np.arange(out)[:, None] + right_dilation * np.arange(right) - padding
  positions, holes = np.divmod(positions, left_dilation)
  return int(np.sum((holes == 0) & (positions >= 0) & (positions < left)))
