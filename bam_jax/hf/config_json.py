"""Converts between a config.json of transformers and our model; unsupported keys are refused."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from bam_jax import config
from bam_jax.config.strict import require
from bam_jax.hf import families, mixtures, names
from bam_jax.hf.families import BAM, FAMILIES, GEMMA3_IMAGES
from bam_jax.hf.mixtures import MIXTURES
from bam_jax.hf.parts import LENGTH, Facts

_READ = *FAMILIES, GEMMA3_IMAGES, BAM


def of_text(config_json: Mapping[str, Any]) -> Mapping[str, Any]:
  """What a config.json says of a text model; Gemma 3 may have that beside one of images."""
  asked, text = config_json.get('architectures'), config_json.get('text_config')
  if asked != [GEMMA3_IMAGES.architecture] or not isinstance(text, dict):
    return config_json
  return {LENGTH: 131_072} | text | {'architectures': asked}


def to_model(config_json: Mapping[str, Any]) -> config.Model:
  """The model that a config.json describes.

  UserError names a key that describes a model unlike ours, is unknown and not turned off, or is
  missing and has no safe default.
  """
  asked = config_json.get('architectures')
  family = next((one for one in _READ if [one.architecture] == asked), None)
  mixed = any(config_json.get(key) for key in ('num_experts', 'num_local_experts'))
  name = str(asked).strip("[']")
  require(family or not mixed, f'{name} is a mixture: a seed must be dense.')
  known = ', '.join(one.architecture for one in _READ)
  require(family, f'architectures names {asked}: only {known} can be imported.')
  return families.read(family, config_json)


def tensors(model: config.Model, config_json: Mapping[str, Any]) -> tuple[names.Table, dict]:
  """The tensors of a folder by our paths, and the shapes, by name, of others, which are zeros."""
  asked = config_json['architectures']
  (chosen,) = (one for one in (*_READ, *MIXTURES) if [one.architecture] == asked)
  if chosen in MIXTURES:
    return mixtures.tensors(chosen, model)
  return names.renamed(names.tensors(model), chosen.renamed), {}


def to_origin(config_json: Mapping[str, Any]) -> tuple[int, str | None, tuple[str, ...]]:
  """The training length, how a mixture was made, and the sources of its experts."""
  method, sources = config_json.get('upcycling_method'), config_json.get('expert_sources') or ()
  methods = get_args(config.Method)
  require(method in (None, *methods), f'upcycling_method={method!r} is not one of {methods}.')
  return Facts(config_json).take(LENGTH, int), method, tuple(map(str, sources))


def from_model(
  model: config.Model,
  length: int,
  method: str | None,
  sources: Sequence[str],
  architecture: str | None = None,
  biased: bool = False,
) -> dict[str, Any]:
  """The config.json of a model; `to_model` and `to_origin` read it back.

  Its class is the first that computes it, or the one that is asked for; UserError if that one does
  not. BamForCausalLM computes every model. `biased` says that an `expert_bias` is not zero.
  """
  no_class = f'No class of transformers has embedding_rank={model.embedding_rank}'
  require(not model.embedding_rank, f'{no_class}: mix with embedding_rank=0 to export.')
  wrong = {one.architecture: mixtures.objection(one, model, length, biased) for one in MIXTURES}
  fitting = [one for one in FAMILIES if families.describes(one, model)]
  fitting += [one for one in MIXTURES if not wrong[one.architecture]]
  known = {one.architecture: one for one in (*fitting, BAM)}
  reason = wrong.get(architecture, f'This model is not {architecture}')
  require(architecture in (None, *known), f'{reason}: export as {" or ".join(known)}.')
  chosen = known[architecture or next(iter(known))]
  if chosen in MIXTURES:
    return mixtures.write(chosen, model, length) | {LENGTH: length}
  facts = families.write(chosen, model) | {LENGTH: length}
  own = {
    'auto_map': {
      'AutoConfig': 'configuration_bam.BamConfig',
      'AutoModel': 'modeling_bam.BamModel',
      'AutoModelForCausalLM': f'modeling_bam.{BAM.architecture}',
    },
    'upcycling_method': method,
    'expert_sources': list(sources),
  }
  return facts | own if chosen == BAM else facts
