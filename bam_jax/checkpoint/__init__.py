"""Checkpoints: `checkpoint.find`, `checkpoint.read_meta`, `checkpoint.restore_params`."""

# ruff: noqa: F401, I001
from bam_jax.checkpoint.manager import (
  FORMAT, Checkpoints, Meta, find, find_tokenizer, finished_step, open_params, open_tokenizer,
  read_meta, restore_params, write_meta,
)  # fmt: skip
