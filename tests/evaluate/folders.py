"""A checkpoint on disk, as a run leaves it."""

from pathlib import Path

from bam_jax import config
from bam_jax.data.tokenizer import Tokenizer
from tests.upcycle import memory

LENGTH = 24  # that the tiny models were "trained" at


def write_checkpoint(
  folder: Path, model: config.Model, params: dict, tokenizer: Tokenizer, **changes
) -> Path:
  """A run's folder with one step, and its tokenizer beside it."""
  facts = dict(
    sequence_length=LENGTH, step=1, tokenizer_hash=tokenizer.hash, tokenizer_path=str(folder),
    bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token,
  )  # fmt: skip
  memory.save(folder, params, model, **facts | changes)
  tokenizer.save(folder)
  return folder
