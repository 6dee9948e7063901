"""Every key of a recipe, typed and frozen; the one place that says what a configuration may be.

A recipe file's `get_config(arg)` returns an `ml_collections.ConfigDict`. `parse` turns it into the
dataclasses of this package or raises one `UserError` sentence that names the key and the fix: a key
that does not exist, a missing one, a wrong type, a value out of range, and whatever does not fit
together.
"""

# isort: skip_file
from bam_jax.config.model import AttentionExperts, Compute, FFNExperts, Model
from bam_jax.config.recipe import (
  complete, parents, parse, Data, Evaluation, FromCheckpoint, FromRun, FromUpcycle, Guard, Init,
  Intervals, Loss, Mesh, Optimizer, Prepare, Recipe, Run, Schedule, Watch,
)  # fmt: skip
from bam_jax.config.strict import to_dict
from bam_jax.config.upcycle import Method, Upcycle

__all__ = [
  'AttentionExperts', 'Compute', 'Data', 'Evaluation', 'FFNExperts', 'FromCheckpoint', 'FromRun',
  'FromUpcycle', 'Guard', 'Init', 'Intervals', 'Loss', 'Mesh', 'Method', 'Model', 'Optimizer',
  'Prepare', 'Recipe', 'Run', 'Schedule', 'Upcycle', 'Watch', 'complete', 'parents', 'parse',
  'to_dict',
]  # fmt: skip
