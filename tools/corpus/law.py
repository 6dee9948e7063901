"""Readers of law: licence agreements, acts of the European Union, a constitution."""

import html
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from tools.corpus.prose import Document, File

_SHORTEST = 600  # characters: what is shorter is a mention of a licence
_SHORTEST_RULE = 3_000  # a rule is a variant of a licence; only whole ones have something to add
_COMMENT_MARK = re.compile(r'^\s*([*#;/|]+|//|--)\s?')
_ITEM = re.compile(r'\s*(\(?[0-9]{1,2}(\.[0-9]+)*[.)]|\(?[a-zA-Z]{1,3}\)|[-*•])\s')
_BEFORE_ITEM = re.compile(r'\s(?=\(?(?:[0-9]{1,2}|[a-z])[.)] [A-Za-z])')
_ARTICLES = 4  # of the constitution in a document; one alone is short


def licences(files: Iterable[File]) -> Iterator[Document]:
  """ScanCode's database, English only: one licence, or variant of one, a file under YAML facts."""
  for path, data in files:
    if not path.endswith(('.LICENSE', '.RULE')):
      continue
    facts, body = '', data.decode('utf-8', 'replace')
    if body.startswith('---\n') and '\n---\n' in body[4:]:
      facts, body = body[4:].split('\n---\n', 1)
    language = re.search(r'(?m)^language: (\w+)', facts)
    if language and language[1] != 'en':
      continue
    whole = 'is_license_text: yes' in facts and len(body) >= _SHORTEST_RULE
    if len(body) >= _SHORTEST and (whole or path.endswith('.LICENSE')):
      yield PurePosixPath(path).name, _unwrap_items(body)


def _unwrap_items(text: str) -> str:
  """A paragraph or numbered item a line, without the marks of a comment in source code."""
  paragraphs = [[]]
  for line in text.replace('\r\n', '\n').split('\n'):
    line = _COMMENT_MARK.sub('', line).rstrip()
    if not line.strip() or _ITEM.match(line):
      paragraphs.append([])
    if line.strip():
      paragraphs[-1].append(line.strip())
  return '\n'.join(re.sub(r'\s+', ' ', ' '.join(lines)) for lines in paragraphs if lines)


def european_acts(files: Iterable[File]) -> Iterator[Document]:
  """One article a row of a SQLite database."""
  for path, data in files:
    if path.endswith('regulations.db'):
      database = sqlite3.connect(':memory:')
      database.deserialize(data)
      names = dict(database.execute('select celex, name from regulations'))
      articles = database.execute(
        'select celex, article_number, content from articles order by celex, article_number'
      )
      for act, number, text in articles:
        text = _BEFORE_ITEM.sub('\n', text)
        yield f'{act}-art{number}', f'{names[act]}, Article {number}\n{text}'
      database.close()


def indian_constitution(files: Iterable[File]) -> Iterator[Document]:
  """One JSON file of articles."""
  for path, data in files:
    if path.endswith('data/constitution.json'):
      articles = [
        f'Article {article["article"]}. {article["title"]}\n'
        + re.sub(r'\s*\n\s*', '\n', html.unescape(str(article['description'])))
        for article in json.loads(data)
      ]
      for i in range(0, len(articles), _ARTICLES):
        yield f'articles{i}', '\n\n'.join(articles[i : i + _ARTICLES])
