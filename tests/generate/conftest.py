"""The models of tests/model, and parameters to start from."""

from collections.abc import Callable

from flax import traverse_util

from tests.model.conftest import named, start  # noqa: F401


def reader(params: dict) -> Callable:
  """What `Decoder.place` reads from, for a tree of arrays."""
  arrays = traverse_util.flatten_dict(params, sep='/')
  return lambda path, index: arrays[path][index]
