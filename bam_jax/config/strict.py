"""Plain dictionaries to frozen dataclasses and back, refusing whatever does not fit."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from bam_jax.errors import UserError

T = TypeVar('T')


def from_dict(cls: type[T], value: Any, key: str) -> T:
  """Builds the dataclass `cls` from nested mappings.

  Args:
    cls: a frozen dataclass whose annotations are scalars, literals, tuples, mappings, unions or
      other dataclasses. A field's metadata 'key' is its name in the mapping.
    value: the mapping.
    key: the dotted name of `value`, for messages.

  Raises:
    UserError: one sentence that names the key: unknown, missing, of a wrong type or value.
  """
  if not isinstance(value, Mapping):
    raise UserError(f'{key} must be a group of keys, not {value!r}.')
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
    elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
      raise UserError(f'{key}.{name} is missing.')
  try:
    return cls(**arguments)
  except UserError as error:
    raise UserError(f'{key}: {error}') from None


def to_dict(value: Any) -> Any:
  """The nested dict, list and scalar form that `from_dict` reads back."""
  if dataclasses.is_dataclass(value):
    return {_name(f): to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    return {name: to_dict(item) for name, item in value.items()}
  if isinstance(value, tuple | list):
    return [to_dict(item) for item in value]
  return value


def differences(old: Any, new: Any, key: str = '') -> list[str]:
  """What differs between two nested dicts, as `key: old -> new`."""
  if isinstance(old, dict) and isinstance(new, dict):
    names = [*old, *(name for name in new if name not in old)]
    found = []
    for name in names:
      if name not in old or name not in new or old[name] != new[name]:
        dotted = f'{key}.{name}' if key else str(name)
        found += differences(old.get(name), new.get(name), dotted)
    return found
  return [f'{key}: {old!r} -> {new!r}']


def _name(f: dataclasses.Field) -> str:
  return f.metadata.get('key', f.name)


def _value(hint: Any, value: Any, key: str) -> Any:
  origin = typing.get_origin(hint)
  if origin in (typing.Union, types.UnionType):
    return _union(typing.get_args(hint), value, key)
  if origin is Literal:
    choices = typing.get_args(hint)
    if not isinstance(value, str) or value not in choices:
      raise UserError(f'{key}={value!r} is not one of {", ".join(map(repr, choices))}.')
    return value
  if origin is tuple:
    if isinstance(value, str) or not isinstance(value, list | tuple):
      raise UserError(f'{key} must be a list, not {value!r}.')
    return tuple(_value(typing.get_args(hint)[0], v, f'{key}[{i}]') for i, v in enumerate(value))
  if origin is not None and issubclass(origin, Mapping):
    if not isinstance(value, Mapping):
      raise UserError(f'{key} must be a group of keys, not {value!r}.')
    return {
      str(name): _value(typing.get_args(hint)[1], item, f'{key}.{name}')
      for name, item in value.items()
    }
  if dataclasses.is_dataclass(hint):
    return from_dict(hint, value, key)
  return _scalar(hint, value, key)


def _union(hints: tuple, value: Any, key: str) -> Any:
  """The one alternative that a value is meant for: None, a word, a scalar, or a group of keys."""
  if value is None and type(None) in hints:
    return None
  others = [hint for hint in hints if hint is not type(None)]
  if len(others) == 1:
    return _value(others[0], value, key)
  words = [word for hint in others for word in typing.get_args(hint)]
  if isinstance(value, str) and value in words:
    return value
  groups = [hint for hint in others if dataclasses.is_dataclass(hint)]
  if isinstance(value, Mapping):
    for group in groups:
      if set(value) & {_name(f) for f in dataclasses.fields(group)}:
        return from_dict(group, value, key)
  forms = [', '.join(_name(f) for f in dataclasses.fields(group)) for group in groups]
  choices = [*map(repr, words), *(f'a group of {form}' for form in forms)]
  raise UserError(f'{key}={value!r} is none of these: {"; ".join(choices)}.')


_NAMES = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'a string'}


def _scalar(hint: type, value: Any, key: str) -> Any:
  if hint is int and isinstance(value, float) and value.is_integer():
    value = int(value)
  if isinstance(value, int) and abs(value) >= 2**63:
    raise UserError(f'{key} is past 64 bits: choose a smaller number.')
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise UserError(f'{key} must be {_NAMES[hint]}, not {value!r}.')
  return value
