"""Readers of formal text: programs in Python, proofs in HOL Light, statements of Metamath."""

import html
import re
from collections.abc import Iterable, Iterator

from tools.corpus.prose import Document, File
from tools.corpus.text import pieces

_PYTHON_PIECE = 60_000
_HOL_LIGHT = 'usr/share/hol-light/'
_HOL_FOLDERS = ('100', 'Library', 'Examples', 'Logic', 'Complex', 'Geometric_Algebra', 'Arithmetic',
                'Functionspaces')  # fmt: skip

# https://us.metamath.org/downloads/metamath.pdf, chapter 4, and the conventions of set.mm.
_TOKEN = re.compile(
  r'(?s)\$\((?P<comment>.*?)\$\)|(?P<open>\$\{)|(?P<close>\$\})'
  r'|(?P<label>\S+)\s+\$(?P<kind>[aep])\s+(?P<body>.*?)\$\.'
)
_RULER = r'(?:#\*#\*|=-=-|-\.-\.)'  # above and below the title of a section
_SECTION = re.compile(
  rf'(?s)\s*{_RULER}[^\n]*\n(?P<title>.*?)\n[^\n]*{_RULER}[^\n]*\n?(?P<rest>.*)'
)
_HISTORY = re.compile(
  r'\((?:Contributed|Revised|Proof (?:shortened|modification)|New usage|Proposed|Proved)\b[^()]*'
  r'(?:\([^()]*\)[^()]*)*\)'
)
_LABEL_MARK = re.compile(r'(?:^|(?<=\s))~\s+(?=\S)')
_TAG = re.compile(
  r'(?i)</?(?:HTML|PRE|I|B|SUB|SUP|BR|P|UL|OL|LI|A|TABLE|TR|TD|TH|CAPTION|SPAN|FONT)\b[^>]*>'
)


def python(files: Iterable[File]) -> Iterator[Document]:
  """Modules, but for migrations and translations, which are generated."""
  for path, data in files:
    if path.endswith('.py') and '/locale/' not in path and '/migrations/' not in path:
      try:
        text = data.decode('utf-8')
      except UnicodeDecodeError:  # a test of just that
        continue
      for i, piece in enumerate(pieces(text, _PYTHON_PIECE)):
        yield f'{path}#{i}', piece


def hol_light(files: Iterable[File]) -> Iterator[Document]:
  """The proofs, not the prover."""
  for path, data in files:
    inside = path.removeprefix(_HOL_LIGHT)
    if inside != path and path.endswith('.ml') and inside.split('/')[0] in _HOL_FOLDERS:
      for i, piece in enumerate(pieces(data.decode('utf-8', 'replace'))):
        yield f'{inside}#{i}', piece


def metamath(files: Iterable[File]) -> Iterator[Document]:
  """The sections of set.mm: comments and statements with their hypotheses, without proofs."""
  for path, data in files:
    if path.endswith('/set.mm'):
      for i, paragraphs in enumerate(_sections(data.decode('utf-8', 'replace'))):
        for j, piece in enumerate(pieces('\n\n'.join(paragraphs))):
          yield f'sec{i}#{j}', piece


def _sections(source: str) -> Iterator[list[str]]:
  """The title and then the paragraphs of each section that has some.

  The sections before the first axiom are the file's history, and no documents.
  """
  title, paragraphs, started = 'Preface', [], False
  scopes = [[]]  # hypotheses, of the innermost block last
  comment = ''
  for token in _TOKEN.finditer(source):
    if token['comment'] is not None:
      comment = _comment(token['comment'])
      if head := _SECTION.match(token['comment']):
        if paragraphs and started:
          yield [title, *paragraphs]
        title, rest = _spaced(head['title']), _comment(head['rest'])
        paragraphs, comment = [rest] if rest else [], ''
    elif token['open']:
      scopes.append([])
    elif token['close']:
      if len(scopes) > 1:
        scopes.pop()
    else:
      body = re.sub(r'(?s)\$\(.*?\$\)', '', token['body'])
      statement = _spaced(body.split('$=')[0])
      if token['kind'] == 'e':
        scopes[-1].append(statement)
      elif statement.startswith('|-'):  # else it says what is a formula, not what is true
        started = True
        word = 'Axiom' if token['kind'] == 'a' else 'Theorem'
        said = f'{word} {token["label"]}. {comment}'.rstrip()
        hypotheses = [hypothesis for scope in scopes for hypothesis in scope]
        given = [f'  Given: {" & ".join(hypotheses)}'] if hypotheses else []
        paragraphs.append('\n'.join([said, *given, f'  {statement}']))
        comment = ''
  if paragraphs:
    yield [title, *paragraphs]


def _comment(text: str) -> str:
  """A comment's prose: without its history, its marks of labels and formulas, and its HTML."""
  text = _LABEL_MARK.sub('', _HISTORY.sub('', text))
  text = _TAG.sub(' ', text.replace('``', '`').replace('[bib]', ''))
  return html.unescape(_spaced(text)).strip()


def _spaced(text: str) -> str:
  return re.sub(r'\s+', ' ', text).strip()
