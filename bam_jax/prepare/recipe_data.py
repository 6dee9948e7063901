"""The dataset of a recipe, prepared first if it is missing and the recipe says how."""

import functools
import sys

from bam_jax import config
from bam_jax.data import store
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.files import folders
from bam_jax.parallel import processes
from bam_jax.prepare import dataset, sources


def open_dataset(data: config.Data) -> store.Dataset:
  """All domains of a recipe; UserError as by `store.open_dataset`, or when two datasets clash."""
  processes.decide(functools.partial(_prepare_missing, data))
  opened = store.open_dataset(data.path)
  for path in data.more:
    folders.check_bucket(path)
    opened.add(store.open_dataset(path))
  return opened


def _prepare_missing(data: config.Data) -> None:
  path, options = folders.at(data.path), data.prepare
  folders.check_bucket(path)
  if not options or (path / store.MANIFEST).exists():
    return
  source = str(sources.SAMPLE) if options.input == 'sample' else options.input
  domains = sources.find_domains([source])
  tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else None
  print(f'Preparing {path} from {options.input}.', file=sys.stderr)
  how = {key: getattr(options, key) for key in ('skip_unknown', 'min_decoded')}
  how |= dict(tokenizer=tokenizer, train_tokenizer=options.train_tokenizer or None)
  for line in dataset.warnings(dataset.prepare(domains, path, **how)):
    print(line, file=sys.stderr)
