"""A dataset in a bucket: shards are read by position, so this machine gets a copy of it.

The copy lies in the user's cache by the hash of its manifest, which has the hashes of all files:
every run, process and attempt that reads the same dataset shares it.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from bam_jax.data import shards
from bam_jax.errors import UserError
from bam_jax.files import buckets, folders


def publish(source: epath.Path, prepare: Callable[[Path], Any]) -> None:
  """Prepares a dataset here and copies it into a bucket, the manifest last; others may do the same.

  `prepare` makes it in a folder of this machine, and goes on where it was stopped.
  """
  folder = _cache(str(source).encode(), 'making-')
  with _locked(folder):
    prepare(folder)
    buckets.send(folder, source, list(shards.checksums(shards.read_manifest(folder))))
    buckets.send(folder, source, [shards.MANIFEST])
    # This saves downloading what was just uploaded.
    copy = _cache((folder / shards.MANIFEST).read_bytes())
    with _locked(copy), folders.writing(copy):
      if not copy.exists():
        folder.rename(copy)
    shutil.rmtree(folder, ignore_errors=True)


def fetch(source: epath.Path) -> Path:
  """This machine's copy of a dataset, for any number of processes; UserError when it has none."""
  try:
    manifest = (source / shards.MANIFEST).read_bytes()
  except FileNotFoundError:
    raise UserError(
      f'{source} is not a prepared dataset (it has no {shards.MANIFEST}): copy one there, '
      'made by python -m bam_jax.prepare.'
    ) from None
  copy = _cache(manifest)
  with _locked(copy):
    if not copy.exists():
      beside = copy.with_name(f'{copy.name}{folders.BESIDE}')
      with folders.writing(beside):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        (beside / shards.MANIFEST).write_bytes(manifest)
      facts = shards.read_manifest(beside)
      _check_room(source, beside, facts)
      buckets.fetch(source, beside, list(shards.checksums(facts)))
      with folders.writing(copy):
        beside.rename(copy)
  return copy


def _check_room(source: epath.Path, folder: Path, manifest: dict[str, Any]) -> None:
  width = shards.token_dtype(manifest['tokenizer']['vocab_size']).itemsize
  splits = [entry for splits in manifest['domains'].values() for entry in splits.values()]
  needed = sum(entry['tokens'] * width + entry['documents'] * 16 for entry in splits)
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise UserError(
      f'{source} has {needed / 1e9:.3g} GB, but {folder.parent} only {free / 1e9:.3g} GB free: set '
      'XDG_CACHE_HOME to a larger disk, or mount the bucket and name the mounted folder.'
    )


def _cache(content: bytes, prefix: str = '') -> Path:
  """The place in the user's cache of what is known by some content."""
  home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(home) / 'bam_jax' / 'data' / f'{prefix}{hashlib.sha256(content).hexdigest()[:16]}'


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  """One process at a time makes a folder of the cache."""
  with folders.writing(folder):
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = open(f'{folder}.lock', 'wb')
  with lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield
