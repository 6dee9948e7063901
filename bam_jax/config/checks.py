"""Bounds that many keys have; the sentence names the key, and the caller what it is a key of."""

import math

from bam_jax.errors import UserError

LARGEST_SIZE = 2**31 - 1  # of one dimension: what a 32-bit index reaches


def at_least(config, **bounds: float) -> None:
  for key, bound in bounds.items():
    value = getattr(config, key)
    if not bound <= value < math.inf:
      raise UserError(f'{key}={value} is below {bound}.')


def sizes(config, *keys: str) -> None:
  """Dimensions of arrays."""
  at_least(config, **dict.fromkeys(keys, 1))
  for key in keys:
    if getattr(config, key) > LARGEST_SIZE:
      raise UserError(
        f'{key}={getattr(config, key)} is past {LARGEST_SIZE}: choose a smaller size.'
      )


def positive(config, *keys: str) -> None:
  for key in keys:
    value = getattr(config, key)
    if not 0 < value < math.inf:
      raise UserError(f'{key}={value} is not positive.')


def fraction(config, *keys: str) -> None:
  for key in keys:
    if not 0 <= getattr(config, key) <= 1:
      raise UserError(f'{key}={getattr(config, key)} is not between 0 and 1.')
