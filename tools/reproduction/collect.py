"""Keeps what the finished runs of a recipe say, a small file for each seed.

    python -m tools.results collect --workdir=0=runs/r_0 --workdir=1=runs/r_1 --workdir=2=runs/r_2

A seed's file is written anew from its workdir; the files of other seeds stay. `--json` writes
`files`: for each `path`, `seed`, `runs` (names) and `bytes`.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from bam_jax.errors import UserError
from tools.reproduction import facts

_WORKDIR = flags.DEFINE_multi_string('workdir', [], 'SEED=DIR, once for each seed.')
_OUTPUT = flags.DEFINE_string('output', facts.FOLDER, 'Folder of the files.')


def main() -> dict[str, Any]:
  """Collects the workdirs that the flags name."""
  if not _WORKDIR.value:
    raise UserError('--workdir=SEED=DIR is required, once for each seed.')
  collected = {}
  for given in _WORKDIR.value:
    seed, _, workdir = given.partition('=')
    if not seed.isdecimal() or not workdir:
      raise UserError(f'--workdir={given} names no seed: write --workdir=0={workdir or given}.')
    if int(seed) in collected:
      raise UserError(f'--workdir={given}: seed {seed} is given twice.')
    collected[int(seed)] = facts.collect(int(seed), Path(workdir))
  written = []
  for seed, about in collected.items():
    path = Path(_OUTPUT.value) / f'seed_{seed}.json'
    facts.write(path, about)
    written.append(
      {'path': str(path), 'seed': seed, 'runs': sorted(about['runs']), 'bytes': path.stat().st_size}
    )
    print(f'{path}: {len(about["runs"])} runs, {path.stat().st_size:,} bytes', file=sys.stderr)
  return {'files': written}
