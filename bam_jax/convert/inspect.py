"""What a checkpoint is, or how far two are apart.

    python -m bam_jax.convert inspect DIR
    python -m bam_jax.convert inspect runs/mine/seed runs/mine/code

Each is a run's folder (its newest checkpoint), a step's, or what `convert` made. Of two, A and B,
every array is compared: ||A - B|| / ||A|| and the cosine of the angle between them; then every part
of the model as a whole, which shows how far a specialist has moved from its seed, and where.
Arrays are read a few pieces at a time.

`--json` writes for one `checkpoint`, `meta`, `arrays` (`path`, `shape`, `dtype`, `bytes`, `mean`,
`std`, `min`, `max` of the finite values, `not_finite` the number of the others) and `groups`; for
two `a`, `b`, `arrays` (`path`, `{a,b}_{shape,dtype}`, `distance`, `cosine`, `equal`; null where
shapes differ) and `groups`.
"""

from typing import Any

import rich.console

from bam_jax import cli
from bam_jax.convert import inspection
from bam_jax.errors import UserError

MAX_ARGUMENTS = 2


def main(*paths: str) -> dict[str, Any]:
  """Reads what the arguments name, and prints what it found."""
  if not paths:
    raise UserError('Inspect what? Give one checkpoint, or two to compare.')
  with cli.bytes_bar('Reading') as progress:
    look = inspection.describe if len(paths) == 1 else inspection.compare
    facts = look(*paths, progress)
  console = rich.console.Console(stderr=True, markup=False, highlight=False)
  if not console.is_terminal:
    console.width = max(console.width, 140)
  for table in inspection.tables(facts):
    console.print(table)
  return facts
