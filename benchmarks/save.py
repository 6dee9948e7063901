"""How long training waits for a checkpoint: parameters and optimizer state of growing sizes.

    python -m benchmarks.save --workdir=/tmp/save

For dense models of 25M, 98M and 387M parameters (12 bytes each with AdamW's state): seconds until
the loop may go on, `blocked`, in which the arrays are copied; and until all is on disk, `written`,
beside a plain write of as many bytes with an fsync. The least of --rounds.

`--json` writes `saves`: for each size `parameters`, `state_bytes`, `blocked_seconds`,
`written_seconds`, `plain_seconds`.
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from bam_jax import checkpoint, cli, config
from bam_jax.checkpoint import manifest
from bam_jax.errors import UserError
from bam_jax.model import arithmetic
from bam_jax.parallel import sharding
from bam_jax.train import step

LAYERS = 2, 8, 32
BLOCK = 2**24

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder on the disk to measure: 5 GB.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Saves of each size.', lower_bound=1)


def main() -> dict[str, Any]:
  """Saves, and prints a table."""
  if not _WORKDIR.value:
    raise UserError('--workdir is required: a folder on the disk to measure.')
  workdir = Path(_WORKDIR.value).absolute()
  workdir.mkdir(parents=True, exist_ok=True)
  saves = [_measure(layers, workdir) for layers in LAYERS]
  rows = [
    (f'{save["parameters"] / 1e6:.0f}M', f'{save["state_bytes"] / 1e9:.2f} GB',
     *(f'{save[f"{what}_seconds"]:.2f} s' for what in ('blocked', 'written', 'plain')))
    for save in saves
  ]  # fmt: skip
  columns = 'state', 'blocked', 'written', 'a plain write'
  cli.console().print(cli.table('Saving a checkpoint', ['parameters'], columns, rows))
  return {'saves': saves}


def _measure(layers: int, workdir: Path) -> dict[str, float]:
  model = config.Model(
    vocab_size=1024, d_model=1024, num_layers=layers, num_heads=16, num_kv_heads=4, head_dim=64,
    ffn_dim=3072,
  )  # fmt: skip
  mesh = sharding.make_mesh(config.Mesh())
  abstract = step.abstract_state(model, config.Compute(), config.Optimizer(), mesh)
  make = lambda: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), abstract)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  state = jax.block_until_ready(jax.jit(make, out_shardings=shardings)())
  nbytes = sum(x.nbytes for x in jax.tree.leaves(state))
  meta = checkpoint.Meta(
    checkpoint.FORMAT, model, 16, '', '', 'run', 0, None, (), manifest.versions(), '<s>', '</s>'
  )
  best = dict.fromkeys(('blocked_seconds', 'written_seconds', 'plain_seconds'), float('inf'))
  for _ in range(_ROUNDS.value):
    shutil.rmtree(workdir / 'checkpoints', ignore_errors=True)
    os.sync()
    checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', keep=1)
    start = time.monotonic()
    checkpoints.save(1, state.params, state.opt_state, {}, meta)
    blocked = time.monotonic() - start
    checkpoints.wait()
    written = time.monotonic() - start
    checkpoints.close()
    times = blocked, written, _plain(workdir / 'plain', nbytes)
    best = {key: min(best[key], seconds) for key, seconds in zip(best, times)}
  parameters = arithmetic.parameters(model).total
  return {'parameters': parameters, 'state_bytes': nbytes, **best}


def _plain(path: Path, nbytes: int) -> float:
  block, start = os.urandom(BLOCK), time.monotonic()
  with open(path, 'wb', buffering=0) as file:
    for _ in range(nbytes // BLOCK):
      file.write(block)
    os.fsync(file.fileno())
  path.unlink()
  return time.monotonic() - start


if __name__ == '__main__':
  cli.run(main)
