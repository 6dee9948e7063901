"""Draws the tables and pictures of the pages of results, from the files in docs/results/.

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

PAGES = 'docs/results.md', 'docs/results_appendix.md', 'README.md'

_RESULTS = flags.DEFINE_string('results', facts.FOLDER, 'Folder of what collect wrote.')
_PAGES = flags.DEFINE_list('pages', list(PAGES), 'The pages with drawn parts.')


def main() -> dict[str, Any]:
  """Draws what the flags name."""
  folder = Path(_RESULTS.value)
  texts = {Path(page): _read(Path(page)) for page in _PAGES.value}
  seeds = facts.read(folder)
  for name, section in (pages.SECTIONS | {'summary': pages.summary}).items():
    pages.replace(texts, name, section(seeds))
  others = {apart: facts.read(folder / apart) for apart in pages.APART}
  for apart, sections in pages.APART.items():
    for name, section in sections.items():
      pages.replace(texts, name, section(others[apart]))
  drawn = pictures.draw(seeds, folder)
  said = [f'![{told}]({folder.name}/{name})' for name, told in drawn.items()]
  pages.replace(texts, 'pictures', '\n\n'.join(said) or pages.MISSING)
  if others['budgets']:
    pictures.equal_compute(folder / pictures.EQUAL_COMPUTE, others['budgets'])
    drawn[pictures.EQUAL_COMPUTE] = 'Perplexity by training FLOPs'
  for page, text in texts.items():
    page.write_text(text, encoding='utf-8')
  numbers = [seed['seed'] for seed in seeds]
  print(f'{", ".join(map(str, texts))}: seeds {numbers or "none"}', file=sys.stderr)
  return {'seeds': numbers, 'sections': list(pages.SECTIONS), 'pictures': list(drawn)}


def _read(page: Path) -> str:
  try:
    return page.read_text(encoding='utf-8')
  except OSError as error:
    raise UserError(f'--pages: {page} cannot be read: {error.strerror}.') from error
