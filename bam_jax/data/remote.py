"""A dataset in a bucket: shards are read by position, so this machine gets a copy of it.

The copy lies in the user's cache by the hash of its manifest, which has the hashes of all files:
every run, process and attempt that reads the same dataset shares it.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath
from filelock import FileLock

from bam_jax.data import shards
from bam_jax.files import buckets, folders


def publish(source: epath.Path, prepare: Callable[[Path], Any]) -> None:
  """Prepares a dataset here and copies it into a bucket, the manifest last; others may do the same.

  `prepare` makes it in a folder of this machine, and goes on where it was stopped.
  """
  folder = _cache(str(source).encode(), 'making-')
  with FileLock(f'{folder}.lock'):
    prepare(folder)
    buckets.send(folder, source, list(shards.checksums(shards.read_manifest(folder))))
    buckets.send(folder, source, [shards.MANIFEST])
    shutil.rmtree(folder, ignore_errors=True)


def fetch(source: epath.Path) -> Path:
  """This machine's copy of a dataset, for any number of processes; UserError when it has none."""
  manifest = shards.read_manifest(source)
  copy = _cache((source / shards.MANIFEST).read_bytes())
  with FileLock(f'{copy}.lock'):
    if not copy.exists():
      with folders.new_folder(copy) as folder:
        buckets.fetch(source, folder, [shards.MANIFEST, *shards.checksums(manifest)])
  return copy


def _cache(content: bytes, prefix: str = '') -> Path:
  """The place in the user's cache of what is known by some content."""
  home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(home) / 'bam_jax' / 'data' / f'{prefix}{hashlib.sha256(content).hexdigest()[:16]}'
