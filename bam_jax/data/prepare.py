"""Documents to token shards: parallel, restartable, and the same bytes whatever the workers.

One process reads the sources and cuts them into chunks of about `CHUNK_BYTES` of text; workers
turn chunks into files under `DIR.partial`. A rerun skips the chunks that are there. When all are,
they are packed into shards, and one rename makes `DIR` appear, whole.
"""

import collections
import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

import bam_jax.data.shards as shards_lib
from bam_jax.data.encode import encode_all, read_chunk
from bam_jax.data.sources import TRAIN, VALID, Domain
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.files import folders

CHUNK_BYTES = 2**21
VALID_FRACTION = 0.02
SHARD_TOKENS = 2**27
TOKENIZER_BYTES = 2**23
DECODED_BYTES = 2**16  # of each domain, encoded and decoded to see what the tokenizer loses
MIN_DECODED = 0.9
MAX_WORKERS = 1024


def prepare(
  inputs: Mapping[str, str | os.PathLike],
  output: str | os.PathLike,
  *,
  tokenizer: Tokenizer | None = None,
  train_tokenizer: int | None = None,
  valid_fraction: float = VALID_FRACTION,
  text_field: str = 'text',
  shard_tokens: int = SHARD_TOKENS,
  tokenizer_bytes: int = TOKENIZER_BYTES,
  min_decoded: float = MIN_DECODED,
  workers: int = 1,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
  """Prepares a dataset, or returns at once when `output` already holds it; returns the manifest.

  Files marked train, valid (validation, heldout) or test by name go to that split, test files are
  left out. Where a domain has no valid file, a document goes to valid by a hash of its text, so
  that copies of it never lie on both sides. Where it has some, a train document whose exact text
  is also in valid is dropped and counted; copies within train are kept.

  Args:
    inputs: the file or folder of each domain, by name.
    output: the folder to make; `output`.partial holds unfinished work.
    tokenizer: the tokenizer to use, or None to train one.
    train_tokenizer: the vocabulary size of the tokenizer to train, or None when one is given.
    valid_fraction: share of documents held out where no file is; 0 holds none out.
    text_field: the JSON field or Parquet column that holds the text.
    shard_tokens: tokens of a shard at most.
    tokenizer_bytes: a tokenizer is trained on the first so many bytes of each domain's train split.
    min_decoded: share of a domain's characters that must come back from their tokens.
    workers: processes that tokenize; 1 stays in this process.
    progress: called with the bytes of the sources read so far, and all of them.

  Raises:
    UserError: the inputs or options are unfit, or the disk takes no more; `output` is then not
      there, and another attempt goes on from what `output`.partial holds.
  """
  output, inputs = Path(output), {name: Path(path) for name, path in inputs.items()}
  if (tokenizer is None) == (train_tokenizer is None):
    raise UserError('Give either --tokenizer=PATH or --train_tokenizer=SIZE, and not both.')
  if not 0 <= valid_fraction < 1:
    raise UserError(f'--valid_fraction={valid_fraction:g} must be at least 0 and less than 1.')
  sizes = dict(shard_tokens=shard_tokens, tokenizer_bytes=tokenizer_bytes, workers=workers)
  for flag, value in sizes.items():
    if value < 1:
      raise UserError(f'--{flag}={value} must be at least 1.')
  if workers > MAX_WORKERS:
    raise UserError(f'--workers={workers} must be at most {MAX_WORKERS}.')
  for path in inputs.values():
    if output.resolve().is_relative_to(path.resolve()):
      raise UserError(f'--output={output} lies inside the input {path}: choose a folder beside it.')

  domains = [Domain.find(name, path, text_field) for name, path in sorted(inputs.items())]
  plan = {
    'format': shards_lib.FORMAT,
    'sources': [source for domain in domains for source in domain.sources()],
    'left_out': [path for domain in domains for path in domain.left_out],
    'text_field': text_field,
    'valid_fraction': valid_fraction,
    'shard_tokens': shard_tokens,
    'tokenizer_from': _tokenizer_facts(tokenizer)
    if tokenizer
    else {'vocab_size': train_tokenizer, 'bytes_per_domain': tokenizer_bytes},
  }
  partial = Path(f'{os.path.abspath(output)}.partial')  # of "." too
  if output.exists() and not (output.is_dir() and not any(output.iterdir())):
    if not (output / shards_lib.MANIFEST).is_file():
      raise UserError(f'{output} exists and is not a prepared dataset: choose another --output.')
    manifest = shards_lib.open_dataset(output).manifest
    if any(manifest.get(key) != value for key, value in plan.items()):
      raise UserError(
        f'{output} was prepared from other inputs or options: choose another --output or remove it.'
      )
    shutil.rmtree(partial, ignore_errors=True)
    return manifest

  # The readers report what is wrong with an input; what is left is a disk that takes no more.
  with folders.writing(partial), _workplace(partial, plan):
    if tokenizer is None:
      texts = (t for d in domains for t in _head(d, tokenizer_bytes, valid_fraction, TRAIN))
      tokenizer = _trained(partial / 'tokenizer', texts, train_tokenizer)
    plan['decoded'] = {}
    for domain in domains:
      texts = list(_head(domain, DECODED_BYTES, valid_fraction, TRAIN, VALID))
      plan['decoded'][domain.name] = share = _decoded_share(tokenizer, texts)
      if share < min_decoded:
        raise UserError(
          f'The tokenizer gives back {share:.1%} of the text of {domain.name}: choose another one, '
          f'or lower --min_decoded={min_decoded:g}.'
        )
    skipped = collections.Counter()
    tasks = _missing_chunks(partial / 'chunks', domains, valid_fraction, skipped, progress)
    encode_all(tokenizer, tasks, workers)
    manifest = _assemble(partial, plan, skipped, tokenizer, shard_tokens)
    folders.sync(partial / 'dataset')  # a dataset that exists is whole, even after a power cut
    (partial / 'dataset').rename(output)
    shutil.rmtree(partial)
  return manifest


def _head(domain: Domain, size: int, valid_fraction: float, *splits: str) -> Iterator[str]:
  """The first `size` bytes of a domain's text in some splits."""
  for split, text in domain.read(valid_fraction):
    if split in splits:
      yield text[:size]
      size -= len(text.encode())
      if size <= 0:
        return


def _trained(folder: Path, texts: Iterator[str], vocab_size: int) -> Tokenizer:
  """The tokenizer of an earlier attempt, or a new one."""
  if not folder.exists():
    tokenizer = Tokenizer.train(texts, vocab_size)
    unfinished = folder.with_suffix('.unfinished')
    unfinished.mkdir(exist_ok=True)
    tokenizer.save(unfinished)
    unfinished.rename(folder)
  return Tokenizer.load(folder)


def _decoded_share(tokenizer: Tokenizer, texts: list[str]) -> float:
  """Share of the characters of some texts that are there again after encoding and decoding."""
  kept = 0
  for text, ids in zip(texts, tokenizer.encode_batch(texts)):
    kept += (collections.Counter(text) & collections.Counter(tokenizer.decode(ids))).total()
  return kept / max(1, sum(map(len, texts)))


def _missing_chunks(
  chunks: Path,
  domains: list[Domain],
  valid_fraction: float,
  skipped: collections.Counter,
  progress: Callable[[int, int], None],
) -> Iterator[tuple[Path, list[str]]]:
  """The files of chunks that are not there yet, with their texts; counts what is passed over."""
  before, total = 0, sum(domain.size for domain in domains)
  for domain in domains:
    (chunks / domain.name).mkdir(parents=True, exist_ok=True)
    report = lambda done, before=before: progress(before + done, total)
    for split, index, texts in _chunks(domain.read(valid_fraction, skipped, report)):
      path = chunks / domain.name / f'{split}-{index:06}.npz'
      if not path.exists():
        yield path, texts
    before += domain.size
  progress(total, total)


def _chunks(texts: Iterator[tuple[str, str]]) -> Iterator[tuple[str, int, list[str]]]:
  """Cuts each split's texts into chunks: (split, index, texts)."""
  held = collections.defaultdict(list)
  sizes, counts = collections.Counter(), collections.Counter()
  for split, text in texts:
    held[split].append(text)
    sizes[split] += len(text)
    if sizes[split] >= CHUNK_BYTES:
      yield split, counts[split], held.pop(split)
      counts[split] += 1
      sizes[split] = 0
  for split, rest in held.items():
    yield split, counts[split], rest


def _assemble(
  partial: Path,
  plan: dict[str, Any],
  skipped: collections.Counter,
  tokenizer: Tokenizer,
  shard_tokens: int,
) -> dict[str, Any]:
  """Packs the chunks into shards in `partial`/dataset, and writes the manifest."""
  dataset = partial / 'dataset'
  shutil.rmtree(dataset, ignore_errors=True)
  dtype = shards_lib.token_dtype(tokenizer.vocab_size)
  domains = {}
  for chunks in sorted((partial / 'chunks').iterdir()):
    (dataset / chunks.name).mkdir(parents=True)
    domains[chunks.name] = {}
    for split in (TRAIN, VALID):
      paths = sorted(chunks.glob(f'{split}-*.npz'))
      if not paths:
        continue
      pieces = (read_chunk(path) for path in paths)
      shards = shards_lib.write_split(dataset / chunks.name, split, pieces, dtype, shard_tokens)
      reasons = ('empty', 'in_valid')
      domains[chunks.name][split] = {
        **{key: sum(s[key] for s in shards) for key in ('documents', 'tokens', 'bytes')},
        'skipped': {reason: skipped[chunks.name, split, reason] for reason in reasons},
        'shards': shards,
      }
    _check_domain(chunks.name, domains[chunks.name], plan)
  tokenizer.save(dataset)
  manifest = {
    **plan,
    'created_by': f'bam_jax.prepare, tokenizers {tokenizers.__version__}',
    'tokenizer': _tokenizer_facts(tokenizer),
    'domains': domains,
  }
  text = json.dumps(manifest, indent=1) + '\n'
  (dataset / shards_lib.MANIFEST).write_text(text, encoding='utf-8')
  return manifest


def _check_domain(name: str, splits: dict[str, Any], plan: dict[str, Any]) -> None:
  marked = {s['split'] for s in plan['sources'] if s['path'].startswith(f'{name}/')}
  if TRAIN not in splits and marked != {VALID}:
    raise UserError(f'The domain {name} has no document left for train: give it more text.')
  if VALID not in splits and (VALID in marked or plan['valid_fraction'] > 0):
    raise UserError(
      f'The domain {name} has no document for valid: add a valid file, or raise '
      f'--valid_fraction={plan["valid_fraction"]:g} (0 holds nothing out).'
    )


@contextlib.contextmanager
def _workplace(partial: Path, plan: dict[str, Any]) -> Iterator[None]:
  """Locks `partial`, and empties it unless it holds unfinished work of this very plan."""
  partial.mkdir(parents=True, exist_ok=True)
  with open(partial / 'lock', 'wb') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(f'Another prepare is at work in {partial}: wait for it to end.') from error
    wanted = json.dumps({**plan, 'chunk_bytes': CHUNK_BYTES}, indent=1)
    file = partial / 'plan.json'
    if not file.exists() or file.read_bytes() != wanted.encode():
      for entry in partial.iterdir():
        if entry.is_dir():
          shutil.rmtree(entry)
        elif entry.name != 'lock':
          entry.unlink()
      file.write_text(wanted, encoding='utf-8')
    yield


def _tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
  keys = ('hash', 'vocab_size', 'bos_token', 'bos_id', 'eos_token', 'eos_id')
  return {'file': tokenizer.file_name, **{key: getattr(tokenizer, key) for key in keys}}
