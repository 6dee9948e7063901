"""A config.json of transformers, taken key by key."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from bam_jax import config
from bam_jax.config.strict import require

LENGTH = 'max_position_embeddings'
NEEDED = object()  # in place of a default
_KINDS = {int: 'a positive whole number', float: 'a positive number', bool: 'true or false'}


class Facts(dict[str, Any]):
  """A config.json whose keys are taken one by one, so that what is left over is known."""

  def take(self, key: str, kind: type, default: Any = NEEDED) -> Any:
    """A value of a type; if it is absent or null, the default. UserError if there is none."""
    value = self.pop(key, None)
    if value is None:
      require(default is not NEEDED, f'{key} is missing.')
      return default
    fits = type(value) is kind or (kind is float and type(value) is int)
    fits = fits and (kind not in (int, float) or 0 < value <= sys.float_info.max)
    require(fits, f'{key}={value!r} is not {_KINDS.get(kind, f"a {kind.__name__}")}.')
    return kind(value)


class Part(NamedTuple):
  """Keys of config.json that do not say a field as it is."""

  read: Callable[[Facts, dict[str, Any]], dict[str, Any]]  # takes keys; the fields so far -> more
  write: Callable[[config.Model], dict[str, Any]]
