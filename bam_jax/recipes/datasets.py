"""The dataset of a recipe: prepared if it is missing, fetched if it is in a bucket."""

import functools
import sys

from bam_jax import config
from bam_jax.data import prepare, remote, shards, sources
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.files import folders
from bam_jax.parallel import processes


def open_dataset(data: config.Data) -> shards.Dataset:
  """The token shards of a recipe, prepared first if they are missing and the recipe says how."""
  processes.decide(functools.partial(_prepare_missing, data))
  path = folders.at(data.path)
  return shards.open_dataset(remote.fetch(path) if folders.in_bucket(path) else path)


def _prepare_missing(data: config.Data) -> None:
  path, options = folders.at(data.path), data.prepare
  folders.check_bucket(path)
  if not options or (path / shards.MANIFEST).exists():
    return
  print(f'Preparing {path} from {options.input}.', file=sys.stderr)
  prepare_in = functools.partial(
    prepare.prepare,
    sources.find_domains([str(sources.SAMPLE) if options.input == 'sample' else options.input]),
    tokenizer=Tokenizer.load(options.tokenizer) if options.tokenizer else None,
    train_tokenizer=options.train_tokenizer or None,
  )
  remote.publish(path, prepare_in) if folders.in_bucket(path) else prepare_in(path)
