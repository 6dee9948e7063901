"""A dataset that lies in a bucket: shards are read by position, so this machine gets a copy of it.

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

  Args:
    source: the folder to make, in a bucket that `folders.check_bucket` has found.
    prepare: makes the dataset in a folder here, and goes on where it was stopped.
  """
  name = hashlib.sha256(str(source).encode()).hexdigest()[:16]
  folder = _cache() / f'making-{name}'
  with _locked(folder):
    prepare(folder)
    manifest = shards.read_manifest(folder)
    buckets.send(folder, source, _files(manifest))
    buckets.send(folder, source, [shards.MANIFEST])
    # It need not come back from where it went.
    place = _place((folder / shards.MANIFEST).read_bytes())
    with _locked(place), folders.writing(place):
      if not place.exists():
        folder.rename(place)
    shutil.rmtree(folder, ignore_errors=True)


def fetch(source: epath.Path) -> Path:
  """This machine's copy of a dataset; all processes of a job may ask at a time.

  Raises:
    UserError: there is none, it is damaged, or the disk has no room for it.
  """
  content = _manifest(source)
  folder = _place(content)
  with _locked(folder):
    if not folder.exists():
      beside = folder.with_name(f'{folder.name}{folders.BESIDE}')
      with folders.writing(beside):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        (beside / shards.MANIFEST).write_bytes(content)
      manifest = shards.read_manifest(beside)
      _check_room(source, beside, manifest)
      buckets.fetch(source, beside, _files(manifest))
      with folders.writing(folder):
        beside.rename(folder)
  return folder


def _manifest(source: epath.Path) -> bytes:
  try:
    return (source / shards.MANIFEST).read_bytes()
  except FileNotFoundError:
    raise UserError(
      f'{source} is no prepared dataset (it has no {shards.MANIFEST}): copy one there that python '
      '-m bam_jax.prepare has made.'
    ) from None


def _files(manifest: dict[str, Any]) -> list[str]:
  return [manifest['tokenizer']['file']] + [
    f'{domain}/{shard["name"]}.{part}.npy'
    for domain, splits in manifest['domains'].items()
    for entry in splits.values()
    for shard in entry['shards']
    for part in shards.PARTS
  ]


def _check_room(source: epath.Path, folder: Path, manifest: dict[str, Any]) -> None:
  width = shards.token_dtype(manifest['tokenizer']['vocab_size']).itemsize
  splits = [entry for splits in manifest['domains'].values() for entry in splits.values()]
  needed = sum(entry['tokens'] * width + entry['documents'] * 16 for entry in splits)
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise UserError(
      f'{source} has {needed / 1e9:.3g} GB and {folder.parent} {free / 1e9:.3g} GB free: have '
      'XDG_CACHE_HOME name a larger disk, or mount the bucket and give the mounted folder.'
    )


def _cache() -> Path:
  home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(home) / 'bam_jax' / 'data'


def _place(manifest: bytes) -> Path:
  return _cache() / hashlib.sha256(manifest).hexdigest()[:16]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  """One process at a time makes a folder of the cache."""
  with folders.writing(folder):
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = open(f'{folder}.lock', 'wb')
  with lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield
