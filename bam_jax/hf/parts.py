"""How a config.json says what no single key does: rotary positions, and what layers differ in.

Old files have rope_theta and rope_scaling, new ones rope_parameters; some families have more keys.
"""

import sys
from collections.abc import Callable, Mapping
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


_SCALINGS = {
  'linear': {'factor': 'factor'},
  'llama3': {
    'factor': 'factor', 'original_max_position_embeddings': 'original_length',
    'low_freq_factor': 'low', 'high_freq_factor': 'high',
  },
  'yarn': {
    'factor': 'factor', 'original_max_position_embeddings': 'original_length',
    'beta_fast': 'beta_fast', 'beta_slow': 'beta_slow', 'attention_factor': 'attention_factor',
  },
}  # fmt: skip


def read_rope(facts: Facts, theta: float | None) -> dict[str, Any]:
  """Base and perhaps scaling; `theta` is the default, None if there is none that is safe."""
  groups = [facts.take(key, dict, {}) for key in ('rope_parameters', 'rope_scaling')]
  thetas = [one.take('rope_theta', float, None) for one in (facts, *map(Facts, groups))]
  found = [value for value in thetas if value is not None]
  where = 'rope_theta, at the top level and under rope_parameters'
  require(found or theta, f'{where}, is missing.')
  require(len(set(found)) < 2, f'{where}, is given twice, with different values: {found}.')
  scalings = list(dict.fromkeys(_scaling(group, facts) for group in groups if group))
  require(len(scalings) < 2, 'rope_parameters and rope_scaling differ: remove one of them.')
  fields = dict(rope_theta=found[0] if found else theta)
  return fields | (dict(rope_scaling=scalings[0]) if scalings else {})


def _scaling(group: Mapping[str, Any], facts: Facts) -> config.RopeScaling | None:
  rest = {k: v for k, v in group.items() if k not in ('rope_theta', 'partial_rotary_factor')}
  kinds = {rest.pop(key) for key in ('rope_type', 'type') if key in rest} or {'default'}
  kind = kinds.pop()
  wrong = f"rope_type={kind!r} changes with a text's length, or is unknown"
  known = not kinds and kind in ('default', *_SCALINGS)
  require(known, f'{wrong}: default, linear, llama3 and yarn can be imported.')
  keys = _SCALINGS.get(kind, {})
  unknown = [key for key, value in rest.items() if key not in keys and value is not None]
  require(not unknown, f'{", ".join(unknown)} of rope_type={kind!r} is an unsupported key.')
  if kind == 'default':
    return None
  values = Facts(rest)
  fields = {'factor': values.take('factor', float)}
  fields |= {
    ours: values.take(key, float) for key, ours in keys.items() if values.get(key) is not None
  }
  if 'original_max_position_embeddings' in keys:
    fields['original_length'] = int(fields.get('original_length') or facts.take(LENGTH, int))
  return config.RopeScaling(kind, **fields)


def write_rope(theta: float, scaling: config.RopeScaling | None, **more) -> dict[str, Any]:
  """The keys of both forms, which readers of all versions agree on."""
  group = {'rope_type': scaling.kind if scaling else 'default', 'rope_theta': theta, **more}
  keys = _SCALINGS[scaling.kind] if scaling else {}
  group |= {key: getattr(scaling, ours) for key, ours in keys.items() if getattr(scaling, ours)}
  return {'rope_theta': theta, 'rope_parameters': group, 'rope_scaling': group if scaling else None}


ROPE = Part(
  lambda facts, fields: read_rope(facts, fields.get('rope_theta')),
  lambda model: write_rope(model.rope_theta, model.rope_scaling),
)


def _read_nested_rope(
  facts: Facts, fields: dict[str, Any], theta: float = 5e5, sliding: float = 5e5
) -> dict[str, Any]:
  nested = facts.take('rope_parameters', dict, None)
  if nested is None:  # of old files transformers rotates sliding layers by this base, unscaled
    found = read_rope(facts, theta)
  else:
    facts |= {'rope_theta': None, 'rope_scaling': None}
    full = nested.get('full_attention', nested)
    slid = nested.get('sliding_attention', full)
    found = read_rope(Facts(rope_parameters=full), theta)
    scaled = slid.get('rope_type', 'default') != 'default'
    require(not scaled, 'rope_parameters scales sliding layers, which our model does not support.')
    sliding = Facts(slid).take('rope_theta', float, sliding)
  if 'layer_types' in fields and (found.get('rope_scaling') or sliding != found['rope_theta']):
    found['window_rope_theta'] = sliding
  return found


def _write_nested_rope(model: config.Model) -> dict[str, Any]:
  full = ROPE.write(model)['rope_parameters']
  sliding = {'rope_type': 'default', 'rope_theta': model.window_rope_theta or model.rope_theta}
  nested = {'full_attention': full, 'sliding_attention': sliding}
  return {'rope_theta': model.rope_theta, 'rope_parameters': nested}


def _read_partial_rope(
  facts: Facts, fields: dict[str, Any], theta: float = 1e4, part: float = 1.0
) -> dict[str, Any]:
  facts.pop('original_max_position_embeddings', None)
  groups = [Facts(facts).take(key, dict, {}) for key in ('rope_parameters', 'rope_scaling')]
  found = [one.take('partial_rotary_factor', float, None) for one in (facts, *map(Facts, groups))]
  part = next(filter(None, found), part)
  partial = dict(rotary_dim=int(fields['head_dim'] * part)) if part != 1 else {}
  return partial | read_rope(facts, theta)


def _write_partial_rope(model: config.Model) -> dict[str, Any]:
  part = {'partial_rotary_factor': (model.rotary_dim or model.head_dim) / model.head_dim}
  return part | write_rope(model.rope_theta, model.rope_scaling, **part)


def _read_neox_rope(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  part, theta = facts.take('rotary_pct', float, 0.25), facts.take('rotary_emb_base', float, 1e4)
  return _read_partial_rope(facts, fields, theta, part)


def _write_neox_rope(model: config.Model) -> dict[str, Any]:
  written = _write_partial_rope(model)
  part = written['partial_rotary_factor']
  return written | {'rotary_pct': part, 'rotary_emb_base': model.rope_theta}


def _read_gemma3_rope(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  return _read_nested_rope(facts, fields, 1e6, facts.take('rope_local_base_freq', float, 1e4))


def _write_gemma3_rope(model: config.Model) -> dict[str, Any]:
  sliding = {'rope_local_base_freq': model.window_rope_theta or model.rope_theta}
  return _write_nested_rope(model) | sliding


def _read_windows(facts: Facts, fields: dict[str, Any], slides=lambda number: False, window=None):
  """`layer_types` and `window`; without layer_types, `slides` says of a layer's number."""
  count = fields['num_layers']
  size = facts.take('sliding_window', int, window)
  default = [('sliding' if slides(n) else 'full') + '_attention' for n in range(count)]
  layers = facts.take('layer_types', list, default)
  known = len(layers) == count and set(layers) <= {'sliding_attention', 'full_attention'}
  require(known, f'layer_types={layers!r} does not list num_hidden_layers={count} layers.')
  if 'sliding_attention' not in layers:
    return {}
  require(size, 'sliding_window is null, but layer_types has sliding_attention.')
  return dict(layer_types=tuple(name.removesuffix('_attention') for name in layers), window=size)


def _write_windows(model: config.Model) -> dict[str, Any]:
  layers = model.layer_types or ('full',) * model.num_layers
  window = model.window or None
  return {'layer_types': [f'{kind}_attention' for kind in layers], 'sliding_window': window}


def read_pattern(facts: Facts, fields: dict[str, Any], every: int = 4) -> dict[str, Any]:
  """Windows of all layers but every fourth, or so, unless layer_types says more."""
  return _read_windows(facts, fields, lambda number: (number + 1) % every != 0, 4096)


def _read_cohere2_windows(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  found = read_pattern(facts, fields, facts.take('sliding_window_pattern', int, 4))
  layers = found.get('layer_types', ('full',) * fields['num_layers'])
  found['nope_layers'] = tuple(n for n, kind in enumerate(layers) if kind == 'full')
  # transformers ignores the key.
  return found | dict(head_dim=fields['d_model'] // fields['num_heads'])


def _read_qwen_windows(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  first = facts.take('max_window_layers', int, 28)
  if facts.take('use_sliding_window', bool, False):
    return _read_windows(facts, fields, lambda number: number >= first, 4096)
  facts.take('sliding_window', int, None)
  return _read_windows(facts, fields)


def all_or_none(default: int | None) -> Part:
  """A window of all layers or of none; `default` if the key is absent, while null is none."""

  def read_window(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
    window = facts.take('sliding_window', int, facts.get('sliding_window', default))
    return dict(layer_types=('sliding',) * fields['num_layers'], window=window) if window else {}

  return Part(read_window, lambda model: {'sliding_window': model.window or None})


def _write_qwen_windows(model: config.Model) -> dict[str, Any]:
  used = {'use_sliding_window': bool(model.window), 'max_window_layers': 28}
  return _write_windows(model) | used


def _read_nope_layers(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  every = facts.take('no_rope_layer_interval', int, 4)
  default = [(n + 1) % every for n in range(fields['num_layers'])]  # 0: it does not rotate
  turns = facts.take('no_rope_layers', list, default)
  require(len(turns) == len(default), f'no_rope_layers={turns!r} does not list every layer.')
  return dict(nope_layers=tuple(n for n, turn in enumerate(turns) if not turn))


def _write_nope_layers(model: config.Model) -> dict[str, Any]:
  turns = [int(n not in model.nope_layers) for n in range(model.num_layers)]
  return {'no_rope_layers': turns, 'no_rope_layer_interval': 4}


NESTED_ROPES = Part(_read_nested_rope, _write_nested_rope)  # a group of keys for each type
GEMMA3_ROPES = Part(_read_gemma3_rope, _write_gemma3_rope)
PARTIAL_ROPE = Part(_read_partial_rope, _write_partial_rope)  # some of a head's channels
NEOX_ROPE = Part(_read_neox_rope, _write_neox_rope)
WINDOWS = Part(_read_windows, _write_windows)
PATTERN = Part(read_pattern, _write_windows)
COHERE2_WINDOWS = Part(_read_cohere2_windows, _write_windows)
QWEN_WINDOWS = Part(_read_qwen_windows, _write_qwen_windows)
NOPE_LAYERS = Part(_read_nope_layers, _write_nope_layers)
