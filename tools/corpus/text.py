"""What is done to every text: cleaned, and cut into pieces when it is long."""

import re
import unicodedata

PIECE = 24_000  # characters
_BLANK_LINES = re.compile(r'\n\s*\n')
_UNPRINTABLE = re.compile(r'[^\n\x20-\x7e\u00a0-\uffff\U00010000-\U0010ffff]')


def clean(text: str) -> str:
  """Unicode NFC, spaces for tabs, nothing unprintable, at most one blank line at a time."""
  text = unicodedata.normalize('NFC', text).replace('\r\n', '\n')
  text = _UNPRINTABLE.sub('', text.replace('\t', '    ').replace('\u00a0', ' '))
  text = re.sub(r'[ ]+\n', '\n', text)
  return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


def pieces(text: str, size: int = PIECE) -> list[str]:
  """Cuts a text at blank lines, and a paragraph above the size at the ends of sentences.

  Each piece but the last has `size` characters or somewhat more.
  """
  sentences = re.compile(rf'(?s).{{{size // 4},}}?(?:(?<=[.!?]) |$)|.+$')
  cut, piece, length = [], [], 0
  for paragraph in _BLANK_LINES.split(text):
    for part in [paragraph] if len(paragraph) < size else sentences.findall(paragraph):
      piece.append(part)
      length += len(part) + 2
      if length >= size:
        cut.append('\n\n'.join(piece))
        piece, length = [], 0
  return [*cut, '\n\n'.join(piece)] if piece else cut


def unwrap(text: str) -> str:
  """Joins the lines of each paragraph."""
  paragraphs = _BLANK_LINES.split(text.replace('\r\n', '\n'))
  return '\n\n'.join(re.sub(r'\s*\n\s*', ' ', paragraph).strip() for paragraph in paragraphs)
