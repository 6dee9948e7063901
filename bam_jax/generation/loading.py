"""A checkpoint's model on the devices and its tokenizer."""

from typing import NamedTuple

import jax

from bam_jax import arrays, checkpoint, config, sharding
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.generation import generator
from bam_jax.model import transformer


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
  tokenizer = Tokenizer.load(checkpoint.find_tokenizer(path), meta.bos_token, meta.eos_token)
  reader = arrays.Reader(checkpoint.find(path) / 'params')
  wanted = transformer.Network(meta.model, config.Compute()).abstract()
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
    name = sharding.path_of(key_path)
    spec = reader.specs.get(name)
    if spec is None or spec.shape != leaf.shape:
      raise UserError(
        f'{reader.folder} has {name} of shape {spec and spec.shape} where {leaf.shape} is wanted: '
        'it is damaged.'
      )
  made = generator.Generator(
    meta.model,
    reader.read,
    dtype=dtype,
    mesh=mesh,
    stops=[tokenizer.eos_id],
    num_words=tokenizer.vocab_size,
  )
  return Loaded(meta, tokenizer, made)
