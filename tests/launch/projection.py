"""The little of gcloud's `--format` and `--filter` that launch/ uses."""

import re
from typing import Any

_STEP = re.compile(r'\.?([A-Za-z_][\w-]*)(\(\))?|\[(\d+)\]')


def value(text: str, row: dict[str, Any]) -> str:
  """A row by `value(KEY,…)`: tabs between, empty for what is not there."""
  match = re.fullmatch(r'\s*value\((.*)\)\s*', text, re.DOTALL)
  if not match:
    raise SystemExit(f'ERROR: unknown format {text!r}')
  found = [_get(key.strip(), row) for key in match[1].split(',')]
  return '\t'.join('' if each is None else str(each) for each in found)


def passes(text: str, row: dict[str, Any]) -> bool:
  """Whether a row passes `KEY=VALUE`, or `KEY:*`, which asks that there be one."""
  if text.endswith(':*'):
    return _get(text[:-2], row) is not None
  key, sign, wanted = text.partition('=')
  if not sign or not wanted or ' ' in text:
    raise SystemExit(f'ERROR: unknown filter {text!r}')
  return _get(key, row) == wanted


def _get(key: str, here: Any) -> Any:
  end = 0
  for step in _STEP.finditer(key):
    if step.start() != end:
      break
    end = step.end()
    name, call, index = step.groups()
    if here is None:
      continue
    if index:
      here = here[int(index)] if int(index) < len(here) else None
    elif not call:
      here = here.get(name)
    elif name == 'basename':
      here = here.rsplit('/', 1)[-1]
    elif name == 'len':
      here = len(here)
    else:
      raise SystemExit(f'ERROR: unknown transform {name}() in {key!r}')
  if end != len(key):
    raise SystemExit(f'ERROR: cannot read the key {key!r}')
  return here
