"""JSON from untrusted files: bounded in memory, with one kind of error."""

import json
from pathlib import Path
from typing import Any

from etils import epath

from bam_jax.errors import UserError

MAX_BYTES = 2**26


def load(path: Path | epath.Path) -> Any:
  """The value in a file.

  OSError; ValueError if it exceeds MAX_BYTES, is not UTF-8 or JSON, or is nested too deep.
  """
  with path.open('rb') as file:
    content = file.read(MAX_BYTES + 1)
  if len(content) > MAX_BYTES:
    raise ValueError(f'it is larger than {MAX_BYTES >> 20} MiB')
  return loads(content.decode('utf-8-sig'))  # with or without a byte-order mark


def load_record(path: Path | epath.Path) -> dict[str, Any] | None:
  """What a file of a run's folder holds; None without one, UserError when it is damaged."""
  try:
    return load(path)
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error}): delete it and train that run again.') from None


def loads(text: str) -> Any:
  """The value of a text; ValueError if it is not JSON, or is nested too deep."""
  try:
    return json.loads(text)
  except RecursionError:
    raise ValueError('it is nested too deep') from None
