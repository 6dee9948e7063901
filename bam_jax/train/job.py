"""What `loop.train` is to do."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_jax import checkpoint, config
from bam_jax.data import store
from bam_jax.model import transformer


@dataclass(frozen=True)
class Job:
  """One run with everything decided that its recipe decides."""

  name: str
  run: config.Run
  model: config.Model
  recipe: config.Recipe
  dataset: store.Dataset
  domains: tuple[str, ...]  # to evaluate
  folder: Path  # of the run
  init: Callable[[Any], transformer.Params]  # from the parameters' shardings
  meta: Callable[[int], checkpoint.Meta]  # of a step
