"""How a config.json says what RoPE does.

Old files have rope_theta and rope_scaling, new ones rope_parameters; some families have more keys.
"""

from collections.abc import Mapping
from typing import Any

from bam_jax import config
from bam_jax.config.strict import require
from bam_jax.hf.facts import LENGTH, Facts, Part

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


def read(facts: Facts, theta: float | None) -> dict[str, Any]:
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
  require(not unknown, f'{(unknown or [""])[0]} of rope_type={kind!r} is an unsupported key.')
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


def write(theta: float, scaling: config.RopeScaling | None, **more) -> dict[str, Any]:
  """The keys of both forms, which readers of all versions agree on."""
  group = {'rope_type': scaling.kind if scaling else 'default', 'rope_theta': theta, **more}
  keys = _SCALINGS[scaling.kind] if scaling else {}
  group |= {key: getattr(scaling, ours) for key, ours in keys.items() if getattr(scaling, ours)}
  return {'rope_theta': theta, 'rope_parameters': group, 'rope_scaling': group if scaling else None}


ROPE = Part(
  lambda facts, fields: read(facts, fields.get('rope_theta')),
  lambda model: write(model.rope_theta, model.rope_scaling),
)


def _read_nested_rope(
  facts: Facts, fields: dict[str, Any], theta: float = 5e5, sliding: float = 5e5
) -> dict[str, Any]:
  nested = facts.take('rope_parameters', dict, None)
  if nested is None:  # of old files transformers rotates sliding layers by this base, unscaled
    found = read(facts, theta)
  else:
    facts |= {'rope_theta': None, 'rope_scaling': None}
    full = nested.get('full_attention', nested)
    slid = nested.get('sliding_attention', full)
    found = read(Facts(rope_parameters=full), theta)
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


def _read_phi3_rope(
  facts: Facts, fields: dict[str, Any], theta: float = 1e4, part: float = 1.0
) -> dict[str, Any]:
  facts.pop('original_max_position_embeddings', None)
  groups = [Facts(facts).take(key, dict, {}) for key in ('rope_parameters', 'rope_scaling')]
  found = [one.take('partial_rotary_factor', float, None) for one in (facts, *map(Facts, groups))]
  part = next(filter(None, found), part)
  partial = dict(rotary_dim=int(fields['head_dim'] * part)) if part != 1 else {}
  return partial | read(facts, theta)


def _read_neox_rope(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  part, theta = facts.take('rotary_pct', float, 0.25), facts.take('rotary_emb_base', float, 1e4)
  return _read_phi3_rope(facts, fields, theta, part)


def _write_neox_rope(model: config.Model) -> dict[str, Any]:
  written = _write_phi3_rope(model)
  part = written['partial_rotary_factor']
  return written | {'rotary_pct': part, 'rotary_emb_base': model.rope_theta}


def _write_phi3_rope(model: config.Model) -> dict[str, Any]:
  part = {'partial_rotary_factor': (model.rotary_dim or model.head_dim) / model.head_dim}
  return part | write(model.rope_theta, model.rope_scaling, **part)


def _read_gemma3_rope(facts: Facts, fields: dict[str, Any]) -> dict[str, Any]:
  return _read_nested_rope(facts, fields, 1e6, facts.take('rope_local_base_freq', float, 1e4))


def _write_gemma3_rope(model: config.Model) -> dict[str, Any]:
  sliding = {'rope_local_base_freq': model.window_rope_theta or model.rope_theta}
  return _write_nested_rope(model) | sliding


NESTED = Part(_read_nested_rope, _write_nested_rope)  # one group of keys for each type of layer
GEMMA3 = Part(_read_gemma3_rope, _write_gemma3_rope)
PARTIAL = Part(_read_phi3_rope, _write_phi3_rope)  # some of a head's channels
NEOX = Part(_read_neox_rope, _write_neox_rope)
