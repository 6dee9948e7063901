"""One HTML page of what the routers do, with everything inside: it needs neither files nor network.

The page draws what it finds in `data`, a JSON object, as text; its own policy forbids it to load
anything.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bam_jax.data.tokenizer import Tokenizer
from bam_jax.evaluate import corpus, routing
from bam_jax.evaluate.comparison import Entry
from bam_jax.generate import text
from bam_jax.reports import figures

PAGE = Path(__file__).with_name('page.html')


def write(
  folder: Path, facts: Mapping[str, Any], entries: Sequence[Entry], domains: Sequence[corpus.Domain]
) -> Path:
  """Draws the pictures into the folder, which exists, and writes `routing.html`; returns its path.

  `facts` are those of `--json`, with routing, `entries` their checkpoints in the same order.
  """
  routed = [(row, entry) for row, entry in zip(facts['rows'], entries) if row['routing']]
  data = {
    'labels': [row['label'] for row in facts['rows']],
    'domains': facts['domains'],
    'shares': routing.own_shares(facts),
    'colours': figures.COLOURS,
    'pictures': [
      (title, base64.b64encode(path.read_bytes()).decode())
      for title, path in _draw(folder, [row for row, _ in routed])
    ],
    'documents': [
      {'title': f'{domain.name}: {row["label"]}, document {number + 1}'}
      | {'experts': max(row['experts'].values(), key=len)}
      | _tokens(entry, domain, number)
      for domain in domains
      for number in range(min(routing.SHOWN, len(domain.byte_counts)))
      for row, entry in routed
    ],
  }
  page, path = PAGE.read_text(encoding='utf-8'), folder / 'routing.html'
  data = json.dumps(data).replace('<', '\\u003c')  # nothing in it is a tag
  path.write_text(page.replace('/* data */', data), encoding='utf-8')
  return path


def _draw(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Path]]:
  """Draws all pictures of the rows with routers, and gives their titles."""
  figures.routers_by_layer(folder / 'by_layer.png', rows)
  yield 'Layer by layer', folder / 'by_layer.png'
  for number, row in enumerate(rows):
    for router, by_domain in row['routing'].items():
      path = folder / f'{number}_{router}.png'
      loads = {domain: facts['load'] for domain, facts in by_domain.items()}
      shown = row | {'experts': row['experts'][router], 'routing': {router: loads}}
      figures.routing(path, shown)
      yield f'{row["label"]}: {figures.NAMES[router]}', path


def _tokens(entry: Entry, domain: corpus.Domain, number: int) -> dict[str, Any]:
  """The first tokens of a document, and by router the strongest expert of each and its gate, LT."""
  choices = {}
  for router, routed in entry.records[domain.name].shown(number).items():
    visited_LTE = np.where(routed.load_LTE > 0, routed.gate_LTE, -1.0)
    expert_LT, gate_LT = visited_LTE.argmax(-1), visited_LTE.max(-1).astype(np.float64)
    choices[router] = {'expert': expert_LT.tolist(), 'gate': gate_LT.round(2).tolist()}
    length = expert_LT.shape[1]
  tokens = domain.documents(entry.tokenizer)[number]
  pieces = _pieces(entry.tokenizer, tokens[:length].tolist())
  return {'choices': choices, 'pieces': pieces, 'more': length < len(tokens) - 1}


def _pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
  """The text of each token; a character of several tokens is the last one's."""
  spelling = text.Continuation(tokenizer, tokens[:1])
  pieces = [tokenizer.bos_token, *(spelling.add([token]) for token in tokens[1:])]
  pieces[-1] += spelling.finish()
  return pieces
