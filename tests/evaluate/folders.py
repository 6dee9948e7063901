"""A checkpoint on disk, as a run leaves it."""

from pathlib import Path

import numpy as np

from bam_jax import checkpoint, config
from bam_jax.checkpoint import manifest
from bam_jax.data.tokenizer import Tokenizer

LENGTH = 24  # that the tiny models were "trained" at


def write_checkpoint(
  folder: Path, model: config.Model, params: dict, tokenizer: Tokenizer, **changes
) -> Path:
  """A run's folder with one step, and its tokenizer beside it."""
  folder.mkdir()
  tokenizer.save(folder)
  facts = dict(
    format=checkpoint.FORMAT, model=model, sequence_length=LENGTH, tokenizer_hash=tokenizer.hash,
    tokenizer_path=str(folder), run=folder.name, step=1, method=None, sources=(),
    versions=manifest.versions(), bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token,
  )  # fmt: skip
  made = checkpoint.Checkpoints(folder / 'checkpoints', keep=1)
  made.save(1, params, {'count': np.zeros(())}, {}, checkpoint.Meta(**facts | changes))
  made.close()
  return folder
