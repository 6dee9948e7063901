"""Converts plain dictionaries to frozen dataclasses and back; anything that does not fit raises."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from bam_jax.errors import UserError

MAX_SIZE = 2**31 - 1  # of one dimension: the range of a 32-bit index

# A key's bounds: (lowest, highest) in its annotation.
Size = Annotated[int, (1, MAX_SIZE)]
Count = Annotated[int, (0, math.inf)]
PositiveInt = Annotated[int, (1, math.inf)]
Positive = Annotated[float, (math.ulp(0.0), math.inf)]
NonNegative = Annotated[float, (0, math.inf)]
Fraction = Annotated[float, (0, 1)]

_KINDS = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'a string'}


def require(condition: object, message: str) -> None:
  """Raises UserError with the message unless the condition holds."""
  if not condition:
    raise UserError(message)


class Section:
  """A group of keys: a frozen dataclass with numbers within the bounds of their annotations."""

  require = staticmethod(require)

  def __post_init__(self):
    for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
      for low, high in getattr(hint, '__metadata__', ()):
        value = getattr(self, name)
        require(math.isfinite(value), f'{name}={value} is not a finite number.')
        wrong = 'not positive' if 0 < low < 1 else f'below {low}'
        wrong = wrong if high == math.inf else f'not between {low} and {high}'
        require(low <= value <= high, f'{name}={value} is {wrong}.')
    self.check()

  def check(self) -> None:
    """Raises UserError if keys contradict each other."""


def from_dict[T](cls: type[T], value: Any, key: str) -> T:
  """Builds the dataclass `cls` from nested mappings; `key` is the dotted name of `value`.

  Annotations are scalars, literals, tuples, mappings, unions or other dataclasses; a field's
  metadata 'key' is its name in the mapping. UserError names a key that is unknown or missing, or
  whose type or value is wrong.
  """
  _check_group(value, key)
  hints = typing.get_type_hints(cls)
  fields = {_name(f): f for f in dataclasses.fields(cls)}
  for name in value:
    if name not in fields:
      near = difflib.get_close_matches(str(name), fields, n=1)
      hint = f'did you mean {near[0]!r}?' if near else f'it has {", ".join(fields)}.'
      raise UserError(f'{key}.{name} does not exist; {hint}')
  arguments = {}
  for name, f in fields.items():
    if name in value:
      arguments[f.name] = _value(hints[f.name], value[name], f'{key}.{name}')
    elif f.default is f.default_factory is dataclasses.MISSING:
      raise UserError(f'{key}.{name} is missing.')
  try:
    return cls(**arguments)
  except UserError as error:
    raise UserError(f'{key}: {error}') from None


def to_dict(value: Any) -> Any:
  """The nested dict, list and scalar form that `from_dict` reads; valid JSON."""
  if dataclasses.is_dataclass(value):
    return {_name(f): to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    return {name: to_dict(item) for name, item in value.items()}
  return [to_dict(item) for item in value] if isinstance(value, tuple | list) else value


def differences(old: Any, new: Any, key: str = '') -> list[str]:
  """What differs between two nested dicts, as `key: old -> new`."""
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return [f'{key}: {old!r} -> {new!r}']
  found = []
  for name in {**old, **new}:
    if name not in old or name not in new or old[name] != new[name]:
      dotted = f'{key}.{name}' if key else str(name)
      found += differences(old.get(name), new.get(name), dotted)
  return found


def _name(f: dataclasses.Field) -> str:
  return f.metadata.get('key', f.name)


def _check_group(value: Any, key: str) -> None:
  require(isinstance(value, Mapping), f'{key} must be a group of keys, not {value!r}.')


def _value(hint: Any, value: Any, key: str) -> Any:
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if dataclasses.is_dataclass(hint):
    return from_dict(hint, value, key)
  if origin in (typing.Union, types.UnionType):
    return _union(arguments, value, key)
  if origin is Literal:
    known = isinstance(value, str) and value in arguments
    require(known, f'{key}={value!r} is not one of {", ".join(map(repr, arguments))}.')
    return value
  if origin is tuple:
    require(isinstance(value, list | tuple), f'{key} must be a list, not {value!r}.')
    return tuple(_value(arguments[0], item, f'{key}[{i}]') for i, item in enumerate(value))
  if origin is Mapping:
    _check_group(value, key)
    return {str(n): _value(arguments[1], item, f'{key}.{n}') for n, item in value.items()}
  if hint is int and isinstance(value, float) and value.is_integer():
    value = int(value)
  is_int = isinstance(value, int) and not isinstance(value, bool)
  require(not is_int or abs(value) < 2**63, f'{key} exceeds 64 bits: choose a smaller number.')
  if hint is float and is_int:
    return float(value)
  fits = is_int if hint is int else isinstance(value, hint)
  require(fits, f'{key} must be {_KINDS[hint]}, not {value!r}.')
  return value


def _union(hints: tuple, value: Any, key: str) -> Any:
  """The alternative that a value matches: None, a word, a scalar, or a group of keys."""
  others = [hint for hint in hints if hint is not type(None)]
  if value is None and len(others) < len(hints):
    return None
  if len(others) == 1:
    return _value(others[0], value, key)
  choices = []
  for hint in others:
    if dataclasses.is_dataclass(hint):
      names = [_name(f) for f in dataclasses.fields(hint)]
      if isinstance(value, Mapping) and set(value) & set(names):
        return from_dict(hint, value, key)
      choices.append(f'a group of {", ".join(names)}')
    elif isinstance(value, str) and value in typing.get_args(hint):
      return value
    else:
      choices += map(repr, typing.get_args(hint))
  raise UserError(f'{key}={value!r} is none of these: {"; ".join(choices)}.')
