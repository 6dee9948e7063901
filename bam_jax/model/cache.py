"""Keys and values of the tokens so far, so that none is computed twice.

A layer keeps one set of them for each attention expert with keys and values of its own, on that
expert's device, and else one. Heads stand before slots: with one query a head, each head's scores
are then a product with a matrix that is contiguous.

Legend: X parts along the mesh's `expert` axis, 1 but for sets of experts; B batch, T new tokens,
G key-value heads, S slots, K head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.model.resident import ROWS, Resident


class Set(NamedTuple):
  """Keys and values of one set."""

  key: Any  # XBGSK
  value: Any  # XBGSK


Cache = list[list[Set]]  # of each layer, of each of a device's sets
AS_IT_LIES = Layout(major_to_minor=tuple(range(5)))  # of XBGSK


def zeros(model: config.Model, layout: Resident, batch: int, slots: int, dtype: str) -> Cache:
  """An empty cache on the devices."""
  shape, spec = _array(model, layout, batch, slots)
  sharded = jax.sharding.NamedSharding(layout.mesh, spec) if layout.mesh else None
  return _build(model, layout, lambda: jnp.zeros(shape, dtype, device=sharded))


def abstract(model: config.Model, layout: Resident, batch: int, slots: int, dtype: str) -> Cache:
  """Shapes, dtypes and shardings of what `zeros` returns."""
  shape, spec = _array(model, layout, batch, slots)
  sharded = jax.sharding.NamedSharding(layout.mesh, spec) if layout.mesh else None
  return _build(model, layout, lambda: jax.ShapeDtypeStruct(shape, dtype, sharding=sharded))


def specs(model: config.Model, layout: Resident) -> Cache:
  """PartitionSpecs of what `zeros` returns."""
  spec = _array(model, layout, 0, 0)[1]
  return _build(model, layout, lambda: spec)


class Memory:
  """The sets of one layer, while it reads tokens."""

  def __init__(self, sets: list[Set], start: jax.Array):
    """Takes this device's part of the sets, and the slot of the first new token."""
    self.sets: list[Set] = []  # those written so far
    self._old = iter(sets)
    self._start = start

  def remember(self, key_BTGK: jax.Array, value_BTGK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Writes the next set's new tokens, the same slots in every row; returns all of it, BGSK."""

    def write(old_XBGSK, new_BTGK):
      new_XBGTK = new_BTGK.swapaxes(1, 2)[None].astype(old_XBGSK.dtype)
      new_XBGSK = jax.lax.dynamic_update_slice_in_dim(old_XBGSK, new_XBGTK, self._start, axis=3)
      # Or else XLA for TPU copies it all into another layout before a loop over tokens, and back.
      new_XBGSK = with_layout_constraint(new_XBGSK, AS_IT_LIES)
      # Or else XLA writes once more for the matmul that reads it, and into a copy; for CPU it drops
      # the barrier before jax 0.12.
      return jax.lax.optimization_barrier(new_XBGSK)

    old = next(self._old)
    new = Set(write(old.key, key_BTGK), write(old.value, value_BTGK))
    self.sets.append(new)
    return new.key[0], new.value[0]


def _array(model, layout, batch, slots) -> tuple[tuple[int, ...], P]:
  parts = layout.sizes['expert'] if _of_experts(model) else 1
  shape = parts, batch, model.num_kv_heads, slots, model.head_dim
  return shape, P('expert' if _of_experts(model) else None, *ROWS, 'tensor')


def _build(model: config.Model, layout: Resident, make: Callable[[], Any]) -> Cache:
  num_sets = 1
  if _of_experts(model):
    num_sets = model.attention_experts.num_experts // layout.sizes['expert']
  return [[Set(make(), make()) for _ in range(num_sets)] for _ in range(model.num_layers)]


def _of_experts(model: config.Model) -> bool:
  return model.attention_experts is not None and not model.attention_experts.shared_kv
