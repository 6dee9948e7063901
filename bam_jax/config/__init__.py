"""Every key of a recipe, typed and frozen; the one place that says what a configuration may be.

`parse` turns nested mappings into the dataclasses of this package or raises one `UserError`
sentence that names the key and the fix: a key that does not exist, a missing one, a wrong type, a
value out of range, and whatever does not fit together.
"""

# ruff: noqa: F401, I001
from bam_jax.config.model import AttentionExperts, Compute, FFNExperts, Model
from bam_jax.config.recipe import (
  complete, parents, parse, Data, Evaluation, FromCheckpoint, FromRun, FromUpcycle, Guard, Init,
  Intervals, Loss, Mesh, Optimizer, Prepare, Recipe, Run, Schedule, Watch,
)  # fmt: skip
from bam_jax.config.strict import to_dict
from bam_jax.config.upcycle import Method, Upcycle
