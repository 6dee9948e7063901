"""Every key of a recipe, typed and frozen: the only definition of a valid configuration.

`parse` turns nested mappings into the dataclasses of this package or raises a `UserError` with the
key and the fix, for an unknown key, a missing one, a wrong type, a value out of range, or keys that
contradict each other.
"""

# ruff: noqa: F401, I001
from bam_jax.config.model import (
  AttentionExperts, Compute, FFNExperts, LayerKind, Model, Rope, RopeScaling,
)  # fmt: skip
from bam_jax.config.recipe import (
  complete, parents, parse, Data, Evaluation, FromCheckpoint, FromGrow, FromRun, FromUpcycle, Guard,
  Init, Intervals, Loss, Mesh, Optimizer, Prepare, Recipe, Run, Schedule, Watch,
)  # fmt: skip
from bam_jax.config.strict import to_dict
from bam_jax.config.upcycle import Grow, Method, Upcycle
