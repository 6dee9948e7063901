"""A checkpoint opened for use: its tokenizer, and arrays that fit its model, or one sentence."""

import jax
from etils import epath

from bam_jax import config
from bam_jax.checkpoint import arrays, manager
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.model import transformer
from bam_jax.parallel import sharding


def open_tokenizer(path: epath.PathLike, meta: manager.Meta) -> Tokenizer:
  """The checkpoint's own tokenizer; UserError when it has more words than the model."""
  file = manager.find_tokenizer(path)
  words = Tokenizer.load(file, meta.bos_token, meta.eos_token)
  if words.vocab_size > meta.model.vocab_size:
    raise UserError(
      f'{file} has {words.vocab_size:,} tokens and the model of {path} '
      f'{meta.model.vocab_size:,}: it is damaged.'
    )
  return words


def open_params(path: epath.PathLike, model: config.Model) -> arrays.Reader:
  """Reads the parameters; UserError when one of the model's is missing or has another shape."""
  opened = arrays.Reader(manager.find(path) / 'params')
  wanted = transformer.Network(model, config.Compute()).abstract()
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
    name = sharding.path_of(key_path)
    spec = opened.specs.get(name)
    if spec is None or spec.shape != leaf.shape:
      raise UserError(
        f'{opened.folder} has {name} of shape {spec and spec.shape} where {leaf.shape} is wanted: '
        'it is damaged.'
      )
  return opened
