"""The documents that models are compared on, by domain: prepared tokens, or text for any tokenizer.

A document is a sequence of tokens, BOS and EOS included, and the UTF-8 bytes of its text.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bam_jax.config.strict import require
from bam_jax.data import store
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.files import folders
from bam_jax.prepare import documents as documents_lib
from bam_jax.prepare import sources


class Prepared:
  """The first documents of a split of a prepared domain, tokens of one tokenizer."""

  def __init__(self, name: str, dataset: store.Dataset, split: str, max_documents: int | None):
    self.name, self._dataset = name, dataset
    self._documents = dataset.documents(name, split)
    self.byte_counts = self._documents.byte_counts(max_documents)  # int64, of each text

  def check(self, tokenizer: Tokenizer, checkpoint: str) -> None:
    """UserError unless the dataset was prepared with this tokenizer."""
    wrong = f'{self._dataset.path} was prepared with another tokenizer than that of {checkpoint}'
    fix = 'pass text with --data=DOMAIN=FILE, which is tokenized for each checkpoint.'
    found, words = tokenizer.difference(self._dataset.tokenizer()), tokenizer.vocab_size
    if not found and self._dataset.vocab_size > words:
      last = max(ids.max() for ids in self.documents(tokenizer))
      found = f'{last} is a word of the former alone' if last >= words else ''
    require(not found, f'{wrong} ({found}): {fix}')

  def documents(self, tokenizer: Tokenizer) -> Sequence[np.ndarray]:
    """The tokens of each document, in order."""
    return list(itertools.islice(self._documents, len(self.byte_counts)))


class Text:
  """A domain's texts, one a document, to be encoded by each tokenizer."""

  def __init__(self, name: str, texts: Sequence[str]):
    self.name, self._texts = name, texts
    self.byte_counts = np.array([len(text.encode()) for text in texts], np.int64)

  def check(self, tokenizer: Tokenizer, checkpoint: str) -> None:
    """Accepts any tokenizer."""

  def documents(self, tokenizer: Tokenizer) -> Sequence[np.ndarray]:
    """BOS, the text's tokens, and EOS, as `prepare` stores them."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    return [np.array([bos, *ids, eos], np.int32) for ids in tokenizer.encode_batch(self._texts)]


Domain = Prepared | Text


def read(
  given: Sequence[str], split: str, text_field: str, max_documents: int | None
) -> list[Domain]:
  """The domains that `--data` names, in order: folders of prepared datasets, DOMAIN=PATH for text.

  UserError when something cannot be read, holds no document, or names a domain again.
  """
  require(given, '--data=PREPARED_FOLDER or --data=DOMAIN=FILE is required.')
  domains: dict[str, Domain] = {}
  for item in given:
    for domain in _read(item, split, text_field, max_documents):
      twice = f'the domain {domain.name} is given twice; put its files in one folder.'
      require(domain.name not in domains, f'--data={item}: {twice}')
      none = f'--data={item} holds no document of the domain {domain.name}.'
      require(len(domain.byte_counts), none)
      domains[domain.name] = domain
  return list(domains.values())


def _read(item: str, split: str, text_field: str, max_documents: int | None) -> list[Domain]:
  if (folders.at(item) / store.MANIFEST).exists():
    dataset = store.open_dataset(item)
    return [Prepared(name, dataset, split, max_documents) for name in dataset.domains]
  name, equals, path = item.partition('=')
  wrong = f'--data={item} is not a prepared dataset (it has no {store.MANIFEST})'
  fix = f'write --data=DOMAIN={item} for text.'
  require(equals, f'{wrong} and does not name a domain: {fix}')
  wrong = f'--data={item}: a domain name has letters, digits, "_", "-" and ".".'
  require(store.DOMAIN_NAME.fullmatch(name), wrong)
  files = _files(Path(path), split)
  texts = (one.text for file in files for one in documents_lib.read_documents(file, text_field))
  return [Text(name, list(itertools.islice(filter(None, texts), max_documents)))]


def _files(path: Path, split: str) -> list[Path]:
  """A file itself; of a folder whose files are marked with splits those of `split`, else all."""
  files, _ = sources.find_files(path)
  marks = {file: sources.find_split(file.relative_to(path)) for file in files if file != path}
  there = {mark for mark in marks.values() if mark}
  known = f'set --split to one of {", ".join(sorted(there))}.'
  require(not there or split in there, f'{path} has no file of split {split!r}: {known}')
  return [file for file, mark in marks.items() if mark == split] if there else files
