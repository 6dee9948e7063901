"""Local drafts of a bucket's files, transferred whole.

Objects can neither grow nor be memory-mapped, and many libraries only support files.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from bam_jax.files import folders

FILES_AT_ONCE = 8  # each of which takes up to 100 MB of memory


@contextlib.contextmanager
def drafts(target: epath.PathLike) -> Iterator[Path]:
  """A folder to write into; when the block ends, its files appear in `target`, each complete.

  On a disk it is inside `target`: if the disk has room for all files, they all appear.
  """
  remote = folders.in_bucket(target)
  if not remote:
    Path(target).mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=folders.BESIDE, dir=None if remote else target) as beside:
    yield Path(beside)
    files = [path for path in sorted(Path(beside).rglob('*')) if path.is_file()]
    names = [str(path.relative_to(beside)) for path in files]
    if remote:
      send(Path(beside), epath.Path(target), names)
      return
    for path, name in zip(files, names):
      Path(target, name).parent.mkdir(parents=True, exist_ok=True)
      path.replace(Path(target, name))


def send(folder: Path, target: epath.Path, names: Sequence[str]) -> None:
  """Uploads files of a folder to one in a bucket; UserError if the bucket rejects them."""
  import fsspec  # comes with gcsfs, which only buckets need

  with folders.writing(target):
    local, remote = ([str(root / name) for name in names] for root in (folder, target))
    fsspec.filesystem('gcs').put(local, remote, batch_size=FILES_AT_ONCE)
