"""Every key of a recipe, typed and frozen; the one place that says what a configuration may be.

A recipe file's `get_config(arg)` returns an `ml_collections.ConfigDict`. `parse` turns it into the
dataclasses of this package or raises one `UserError` sentence that names the key and the fix: a key
that does not exist, a missing one, a wrong type, a value out of range, and whatever does not fit
together.
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from bam_jax.config import strict
from bam_jax.config.model import AttentionExperts, Compute, FFNExperts, Model
from bam_jax.config.recipe import (
  Data,
  Evaluation,
  FromCheckpoint,
  FromRun,
  FromUpcycle,
  Init,
  Prepare,
  Recipe,
  Run,
  parents,
)
from bam_jax.config.training import Guard, Intervals, Loss, Mesh, Optimizer, Schedule, Watch
from bam_jax.config.upcycle import Method, Upcycle

__all__ = [
  'AttentionExperts', 'Compute', 'Data', 'Evaluation', 'FFNExperts', 'FromCheckpoint',
  'FromRun', 'FromUpcycle', 'Guard', 'Init', 'Intervals', 'Loss', 'Mesh', 'Method', 'Model',
  'Optimizer', 'Prepare', 'Recipe', 'Run', 'Schedule', 'Upcycle', 'Watch', 'complete', 'parents', 'parse',
  'to_dict',
]  # fmt: skip


def parse(config: Mapping) -> Recipe:
  """A recipe from plain nested mappings; UserError says what is wrong."""
  return strict.from_dict(Recipe, config, 'config')


def complete(config: Mapping) -> ConfigDict:
  """What `get_config` returns: the recipe checked and with every default filled in.

  A key that is there can be set on the command line: `--config.runs.seed.compute.dtype=bfloat16`.
  Keys keep the order in which the recipe writes them.
  """
  return _config_dict(to_dict(parse(config)))


def _config_dict(value):
  if not isinstance(value, dict):
    return tuple(value) if isinstance(value, list) else value
  return ConfigDict({key: _config_dict(item) for key, item in value.items()}, sort_keys=False)


def to_dict(config) -> dict | list | str | float | int | None:
  """Plain, JSON-ready values of any of these dataclasses; `strict.from_dict` reads them back."""
  return strict.to_dict(config)
