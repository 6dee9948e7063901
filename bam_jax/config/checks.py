"""Bounds that many keys have; the sentence names the key, and the caller what it is a key of."""

import math

from bam_jax.errors import UserError


def at_least(config, **bounds: float) -> None:
  for key, bound in bounds.items():
    value = getattr(config, key)
    if not (math.isfinite(value) and value >= bound):
      raise UserError(f'{key}={value} is below {bound}.')


def positive(config, *keys: str) -> None:
  for key in keys:
    value = getattr(config, key)
    if not (math.isfinite(value) and value > 0):
      raise UserError(f'{key}={value} is not positive.')


def fraction(config, *keys: str) -> None:
  for key in keys:
    if not 0 <= getattr(config, key) <= 1:
      raise UserError(f'{key}={getattr(config, key)} is not between 0 and 1.')
