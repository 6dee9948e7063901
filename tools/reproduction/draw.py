"""Draws the tables of docs/results.md, its pictures and the README's summary, from docs/results/.

    python -m tools.results draw

In a page, what stands between `<!-- drawn: NAME -->` and `<!-- end -->` is replaced; all else is
left as it is. `--json` writes `seeds`, `sections` and `pictures` (file names).
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from bam_jax.errors import UserError
from tools.reproduction import facts, pages, pictures

_RESULTS = flags.DEFINE_string('results', facts.FOLDER, 'Folder of what collect wrote.')
_PAGE = flags.DEFINE_string('page', 'docs/results.md', 'The page of all tables.')
_README = flags.DEFINE_string('readme', 'README.md', 'The page of the summary.')


def main() -> dict[str, Any]:
  """Draws what the flags name."""
  folder, page, readme = Path(_RESULTS.value), Path(_PAGE.value), Path(_README.value)
  text, summary = _read('page', page), _read('readme', readme)
  seeds = facts.read(folder)
  for name, section in pages.SECTIONS.items():
    text = pages.replace(text, name, section(seeds), page)
  for apart, sections in pages.APART.items():
    others = facts.read(folder / apart)
    for name, section in sections.items():
      text = pages.replace(text, name, section(others), page)
  summary = pages.replace(summary, 'summary', pages.summary(seeds), readme)
  drawn = pictures.draw(seeds, folder)
  said = '\n\n'.join(f'![{told}]({folder.name}/{name})' for name, told in drawn.items())
  page.write_text(pages.replace(text, 'pictures', said or pages.MISSING, page), encoding='utf-8')
  readme.write_text(summary, encoding='utf-8')
  numbers = [seed['seed'] for seed in seeds]
  print(f'{page}: seeds {", ".join(map(str, numbers)) or "none"}', file=sys.stderr)
  return {'seeds': numbers, 'sections': list(pages.SECTIONS), 'pictures': list(drawn)}


def _read(flag: str, page: Path) -> str:
  try:
    return page.read_text(encoding='utf-8')
  except OSError as error:
    raise UserError(f'--{flag}={page} cannot be read: {error.strerror}.') from error
