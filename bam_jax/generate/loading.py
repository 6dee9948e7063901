"""A checkpoint's model on the devices and its tokenizer."""

from typing import NamedTuple

import jax

from bam_jax import checkpoint
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.generate import generator


class Loaded(NamedTuple):
  """All that continues text."""

  meta: checkpoint.Meta
  tokenizer: Tokenizer
  generator: generator.Generator


def load(path: str, dtype: str, mesh: jax.sharding.Mesh | None = None) -> Loaded:
  """Loads the checkpoint at or below `path`, an array at a time, onto the mesh.

  Args:
    path: of a run, a step, or what `convert` wrote.
    dtype: 'float32' or 'bfloat16'.
    mesh: default: one device.

  Raises:
    UserError: it is no whole checkpoint, or does not fit the mesh.
  """
  meta = checkpoint.read_meta(path)
  tokenizer, reader = checkpoint.open_tokenizer(path, meta), checkpoint.open_params(path, meta.model)
  made = generator.Generator(
    meta.model,
    reader.read,
    dtype=dtype,
    mesh=mesh,
    stops=[tokenizer.eos_id],
    num_words=tokenizer.vocab_size,
  )
  return Loaded(meta, tokenizer, made)
