"""Text to a prepared dataset: restartable, in bounded memory, and the same bytes each time.

The text of every split is cut into shards of about as many bytes, which the tokenizers' threads
encode, into `DIR.partial`, and shards are shuffled into the store. A rerun skips what is there.
When all is, one rename makes `DIR` appear, whole. A bucket has no rename: the store is written in
place, the manifest last, and `.partial` lies in the user's cache.
"""

import collections
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from etils import epath

from bam_jax.config.strict import require
from bam_jax.data import store
from bam_jax.data.tokenizer import HUGGING_FACE_FILE, Tokenizer, batches
from bam_jax.files import folders
from bam_jax.prepare import shuffle, training
from bam_jax.prepare.sources import TRAIN, VALID, Domain, hold_out

VALID_FRACTION = 0.02
SHARD_BYTES = 2**26  # of text, about, encoded at once
TOKENIZER_BYTES = 2**23  # of each domain, to train a tokenizer on
LOSSLESS = 0.999  # share of the text that must come back, or `warning` says so
DECODED_BYTES = 2**16  # of each domain, encoded and decoded to see what the tokenizer loses
MIN_DECODED = 0.9


def prepare(
  inputs: Mapping[str, str | os.PathLike],
  output: str | os.PathLike,
  *,
  tokenizer: Tokenizer | None = None,
  train_tokenizer: int | None = None,
  valid_fraction: float = VALID_FRACTION,
  text_field: str = 'text',
  skip_unknown: bool = False,
  min_decoded: float = MIN_DECODED,
  shuffle_seed: int = 0,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
  """Prepares a dataset, or returns at once when `output` already holds it; returns the manifest.

  Files marked train, valid (validation, heldout) or test by name go to that split, test files are
  left out. Where a domain has no valid file, a document goes to valid by a hash of its text, so
  that copies of it never lie on both sides. A train document whose exact text is also in a valid
  file of any domain is dropped and counted; copies within train are kept.

  `inputs` are the file or folder of each domain, by name. Without a `tokenizer` a new one of
  `train_tokenizer` tokens is made, of TOKENIZER_BYTES of each domain's train split. `progress` is
  called with the bytes of the sources read so far, and all of them; `python -m bam_jax.prepare
  --help` has the other options.

  UserError when the inputs or options are unfit, or the disk takes no more: `output` is then not
  there, and another attempt goes on from what `output`.partial holds.
  """
  output, inputs = folders.at(output), {name: Path(path) for name, path in inputs.items()}
  remote = folders.in_bucket(output)
  wrong = 'Exactly one of --tokenizer=PATH and --train_tokenizer=SIZE is required.'
  require((tokenizer is None) != (train_tokenizer is None), wrong)
  wrong = f'--valid_fraction={valid_fraction:g} must be at least 0 and less than 1.'
  require(0 <= valid_fraction < 1, wrong)
  for path in inputs.values():
    wrong = f'--output={output} is inside the input {path}: choose another folder.'
    require(remote or not output.resolve().is_relative_to(path.resolve()), wrong)

  read = dict(text_field=text_field, valid_fraction=valid_fraction)
  domains = [
    Domain.find(name, path, **read, skip_unknown=skip_unknown)
    for name, path in sorted(inputs.items())
  ]
  plan = {
    'format': store.FORMAT,
    'sources': [source for domain in domains for source in domain.sources()],
    'left_out': [path for domain in domains for path in domain.left_out],
    **read,
    'shard_bytes': SHARD_BYTES,
    'shuffle_seed': shuffle_seed,
    'tokenizer_from': {'vocab_size': train_tokenizer, 'bytes_per_domain': TOKENIZER_BYTES},
  }
  if tokenizer:
    plan['tokenizer_from'] = _tokenizer_facts(tokenizer)
  partial = _cache(output) if remote else Path(f'{os.path.realpath(output)}.partial')  # of "." too
  if (output / store.MANIFEST).exists():
    manifest = store.open_dataset(output).manifest
    wrong = f'{output} was prepared from other inputs or options: choose another --output.'
    require(manifest == manifest | plan, wrong)
    shutil.rmtree(partial, ignore_errors=True)
    return manifest
  wrong = f'{output} exists and is not a prepared dataset: choose another --output.'
  new = remote or not output.exists() or output.is_dir() and not any(output.iterdir())
  require(new, wrong)

  # The readers report what is wrong with an input; what is left is a disk that takes no more.
  domains = hold_out(domains)
  with folders.writing(partial), _workplace(partial, plan):
    if tokenizer is None:
      trained = partial / 'tokenizer'
      if not (trained / HUGGING_FACE_FILE).exists():
        texts = (text for domain in domains for text in _head(domain, TOKENIZER_BYTES, TRAIN))
        trained.mkdir(exist_ok=True)
        training.train(texts, train_tokenizer).save(trained)
      tokenizer = Tokenizer.load(trained)
    plan['decoded'] = {}
    for domain in domains:
      texts = list(_head(domain, DECODED_BYTES, TRAIN, VALID))
      plan['decoded'][domain.name] = share = _decoded_share(tokenizer, texts)
      wrong = f'The tokenizer reproduces {share:.1%} of the text of {domain.name}: choose another'
      require(share >= min_decoded, f'{wrong} one, or lower --min_decoded={min_decoded:g}.')
    _encode(tokenizer, domains, partial / 'shards', shuffle_seed, progress)
    root = output if remote else partial / 'dataset'
    manifest = plan | _shuffle(partial / 'shards', root, shuffle_seed, domains, tokenizer)
    folders.write_file(root / store.MANIFEST, json.dumps(manifest, indent=1) + '\n')
    if not remote:
      folders.sync(root)  # a dataset that exists is whole, even after a power cut
      root.rename(os.path.realpath(output))  # where a link leads
    shutil.rmtree(partial)
  return manifest


def _head(domain: Domain, size: int, *splits: str) -> Iterator[str]:
  """The first `size` bytes of a domain's text in some splits."""
  for split, text in domain.read():
    if split in splits:
      yield text[:size]
      size -= len(text.encode())
      if size <= 0:
        return


def _decoded_share(tokenizer: Tokenizer, texts: list[str]) -> float:
  """Share of the characters of some texts that are there again after encoding and decoding."""
  kept, total = 0, sum(map(len, texts))
  for text, ids in zip(texts, tokenizer.encode_batch(texts)):
    kept += (collections.Counter(text) & collections.Counter(tokenizer.decode(ids))).total()
  return kept / total if total else 1.0


def warnings(manifest: Mapping[str, Any]) -> list[str]:
  """What a person should know of a prepared dataset."""
  decoded = manifest['decoded'].items()
  lossy = ', '.join(f'{domain} ({share:.2%})' for domain, share in decoded if share < LOSSLESS)
  off = ', '.join(manifest['switched_off'])
  known = lossy and f'WARNING: the tokenizer reproduces only a part of the text in {lossy}'
  return [*filter(None, [known, off and f'Switched off in the tokenizer: {off}.'])]


def _encode(
  tokenizer: Tokenizer,
  domains: list[Domain],
  folder: Path,
  seed: int,
  progress: Callable[[int, int], None],
) -> None:
  """Reads all domains, and writes the shards that are not there yet."""
  dtype = store.token_dtype(tokenizer.vocab_size)
  before, total = 0, sum(domain.size for domain in domains)
  for domain in domains:
    (folder / domain.name).mkdir(parents=True, exist_ok=True)
    report = lambda done, before=before: progress(before + done, total)
    for name, texts in _cut(domain.read(report)):
      path = folder / domain.name / name
      if shuffle.is_written(path):
        continue
      documents = [
        np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype)
        for batch in batches(texts)  # lists of ids take many times their text's memory
        for ids in tokenizer.encode_batch(batch)
      ]
      byte_counts = [len(text.encode()) for text in texts]
      shuffle.write_shard(path, documents, byte_counts, _seed(seed, domain.name, name))
    before += domain.size
  progress(total, total)


def _seed(seed: int, *names: str) -> list[int]:
  """A domain's documents are shuffled alike whatever domains are beside it."""
  return [seed, *'/'.join(names).encode()]


def _cut(documents: Iterator[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
  """The name of every shard, and its texts."""
  held, sizes, counts = collections.defaultdict(list), collections.Counter(), collections.Counter()
  for split, text in documents:
    held[split].append(text)
    sizes[split] += len(text)
    if sizes[split] >= SHARD_BYTES:
      yield f'{split}-{counts[split]:06}', held.pop(split)
      counts[split] += 1
      sizes[split] = 0
  for split, texts in held.items():
    yield f'{split}-{counts[split]:06}', texts


def _shuffle(
  shards: Path, root: Path | epath.Path, seed: int, domains: list[Domain], tokenizer: Tokenizer
) -> dict[str, Any]:
  """Writes all but the manifest below `root`; returns what it says beside the plan."""
  entries, dtype = {}, store.token_dtype(tokenizer.vocab_size)
  for domain in domains:
    found, splits = {}, entries.setdefault(domain.name, {})
    for split in (TRAIN, VALID):
      paths = sorted((shards / domain.name).glob(f'{split}-*.documents'))
      if paths:
        found[split] = [path.with_suffix('') for path in paths]
    marked, wrong = {mark for _, mark in domain.files}, f'The domain {domain.name} has no document'
    require(TRAIN in found or marked == {VALID}, f'{wrong} left for train: add more text.')
    fix = f'raise --valid_fraction={domain.valid_fraction:g} (0 holds nothing out)'
    fix = f'add a valid file, or {fix}' if VALID not in marked else 'its valid files have no text'
    wanted = VALID in marked or domain.valid_fraction > 0
    require(VALID in found or not wanted, f'{wrong} for valid: {fix}.')
    for split, paths in found.items():
      where, done = root / domain.name / split, shards / domain.name / f'{split}.npz'
      order = _seed(seed, domain.name, split)
      splits[split] = {
        **shuffle.write_split(paths, where, dtype, order, done),
        'skipped': {why: domain.skipped[split, why] for why in ('empty', 'in_valid')},
      }
  tokenizer.save(root)
  return {
    'created_by': f'bam_jax.prepare, tokenizers {tokenizers.__version__}',
    'tokenizer': _tokenizer_facts(tokenizer),
    'switched_off': list(tokenizer.switched_off),
    'domains': entries,
  }


def _cache(output: epath.Path) -> Path:
  """Where this machine keeps unfinished work on a dataset in a bucket."""
  home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  name = hashlib.sha256(os.fspath(output).encode()).hexdigest()[:16]
  return Path(home) / 'bam_jax' / 'data' / name


@contextlib.contextmanager
def _workplace(partial: Path, plan: dict[str, Any]) -> Iterator[None]:
  """Locks `partial`, and empties it unless it holds unfinished work of this very plan."""
  partial.mkdir(parents=True, exist_ok=True)
  with folders.locked(partial) as free:
    wrong = f'Another prepare is running in {partial}, or its file system has no locks'
    require(free, f'{wrong}: wait for it to end, or choose another --output.')
    wanted = json.dumps(plan, indent=1)
    file = partial / 'plan.json'
    if not file.exists() or file.read_bytes() != wanted.encode():
      for folder in partial.glob('*/'):
        shutil.rmtree(folder)
      file.write_text(wanted, encoding='utf-8')
    yield


def _tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
  keys = ('hash', 'vocab_size', 'bos_token', 'bos_id', 'eos_token', 'eos_id')
  return {'file': tokenizer.file_name, **{key: getattr(tokenizer, key) for key in keys}}
