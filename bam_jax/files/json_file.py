"""JSON from files in which anything may stand: bounded in memory, and wrong in one way only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

MAX_BYTES = 2**26


def load(path: Path | epath.Path, pairs_hook: Callable | None = None) -> Any:
  """What a file says; `pairs_hook` makes an object of its keys and values, as in `json.loads`.

  Raises OSError, or ValueError when it is over MAX_BYTES, not UTF-8, not JSON, or nested too deep.
  """
  with path.open('rb') as file:
    content = file.read(MAX_BYTES + 1)
  if len(content) > MAX_BYTES:
    raise ValueError(f'it is larger than {MAX_BYTES >> 20} MiB')
  return loads(content.decode(), pairs_hook)


def loads(text: str, pairs_hook: Callable | None = None) -> Any:
  """What a text says; ValueError when it is not JSON, or nested too deep."""
  try:
    return json.loads(text, object_pairs_hook=pairs_hook)
  except RecursionError:
    raise ValueError('it is nested too deep') from None
