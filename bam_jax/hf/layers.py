"""How a config.json says what differs between layers: sliding windows, and layers without RoPE."""

from typing import Any

from bam_jax import config
from bam_jax.config.strict import require
from bam_jax.hf.facts import Facts, Part


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


WINDOWS = Part(_read_windows, _write_windows)
OLMO3 = Part(read_pattern, _write_windows)
COHERE2 = Part(_read_cohere2_windows, _write_windows)
QWEN = Part(_read_qwen_windows, _write_qwen_windows)
NOPE = Part(_read_nope_layers, _write_nope_layers)
