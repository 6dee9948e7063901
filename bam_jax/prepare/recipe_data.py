"""The dataset of a recipe: prepared if it is missing, fetched if it is in a bucket."""

import functools
import sys
from pathlib import Path

from bam_jax import config
from bam_jax.data import remote, shards
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.files import folders
from bam_jax.parallel import processes
from bam_jax.prepare import dataset, sources


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
  source = str(sources.SAMPLE) if options.input == 'sample' else options.input
  domains = sources.find_domains([source])
  tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else None
  print(f'Preparing {path} from {options.input}.', file=sys.stderr)

  def prepare_in(folder: Path) -> None:
    how = dict(train_tokenizer=options.train_tokenizer or None, skip_unknown=options.skip_unknown)
    if warning := dataset.warning(dataset.prepare(domains, folder, tokenizer=tokenizer, **how)):
      print(warning, file=sys.stderr)

  remote.publish(path, prepare_in) if folders.in_bucket(path) else prepare_in(path)
