"""One HTML page of what the routers do, with everything inside: it needs neither files nor network.

Text and names are escaped, and the page's own policy forbids it to load anything.
"""

import base64
import html
import itertools
import json
import re
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
LEFT = ' class="name"'  # of a table's cells


def write(
  folder: Path, facts: Mapping[str, Any], entries: Sequence[Entry], domains: Sequence[corpus.Domain]
) -> Path:
  """Draws the pictures into the folder, which exists, and writes `routing.html`; returns its path.

  `facts` are those of `--json`, with routing, `entries` their checkpoints in the same order.
  """
  routed = [(row, entry) for row, entry in zip(facts['rows'], entries) if row['routing']]
  rows = [row for row, _ in routed]
  routers = dict.fromkeys(name for row in rows for name in row['routing'])
  layers = range(max(entry.meta.model.num_layers for _, entry in routed))
  documents = []
  for domain in domains:
    documents.append(f'<h3>{html.escape(domain.name)}</h3>')
    for number in range(min(routing.SHOWN, len(domain.byte_counts))):
      for row, entry in routed:
        shown = entry.records[domain.name].shown(number)
        tokens = domain.documents(entry.tokenizer)[number]
        documents += [_legend(row, number), _text(entry.tokenizer, tokens, shown)]
  colours = [' '.join(str(n) for n in bytes.fromhex(colour[1:])) for colour in figures.COLOURS]
  parts = {
    'labels': html.escape(', '.join(row['label'] for row in facts['rows'])),
    'shares': _shares(facts['domains'], rows),
    'pictures': ''.join(_draw(folder, rows)),
    'routers': ''.join(f'<option>{name}</option>' for name in routers),
    'layers': ''.join(f'<option value="{layer}">{layer + 1}</option>' for layer in layers),
    'documents': '\n'.join(documents),
    'colours': json.dumps(colours),
  }
  page = re.sub('<!-- ([a-z]+) -->', lambda part: parts[part[1]], PAGE.read_text(encoding='utf-8'))
  path = folder / 'routing.html'
  path.write_text(page, encoding='utf-8', errors='replace')
  return path


def _draw(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
  """Draws all pictures of the rows with routers, as the page shows them."""
  figures.routers_by_layer(folder / 'by_layer.png', rows)
  yield _picture(folder / 'by_layer.png', 'Layer by layer')
  for number, row in enumerate(rows):
    for router, by_domain in row['routing'].items():
      path = folder / f'{number}_{router}.png'
      loads = {domain: facts['load'] for domain, facts in by_domain.items()}
      shown = row | {'experts': row['experts'][router], 'routing': {router: loads}}
      figures.routing(path, shown)
      yield _picture(path, f'{row["label"]}: {figures.NAMES[router]}')


def _picture(path: Path, title: str) -> str:
  data, title = base64.b64encode(path.read_bytes()).decode(), html.escape(title)
  return f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{data}">\n'


def _shares(domains: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
  heads = ''.join(f'<th>{html.escape(name)}</th>' for name in domains)
  lines = [f'<th{LEFT}>checkpoint</th><th{LEFT}>router</th>{heads}']
  for row in rows:
    for router, by_domain in row['routing'].items():
      shares = ''.join(f'<td>{routing.own_share(by_domain[name])}</td>' for name in domains)
      label = html.escape(row['label'])
      lines.append(f'<td{LEFT}>{label}</td><td{LEFT}>{router}</td>{shares}')
  return ''.join(f'<tr>{line}</tr>' for line in lines)


def _legend(row: Mapping[str, Any], number: int) -> str:
  span = '<span style="background: {}88">{}</span>'.format
  names = map(html.escape, max(row['experts'].values(), key=len))
  shown = ''.join(map(span, itertools.cycle(figures.COLOURS), names))
  return f'<p class="legend">{html.escape(row["label"])}, document {number + 1} {shown}</p>'


def _text(tokenizer: Tokenizer, tokens: np.ndarray, shown: Mapping[str, routing.Routed]) -> str:
  """A document's first tokens; each holds for every router its expert and gate, layer by layer."""
  codes = {name: _codes(routed) for name, routed in shown.items()}
  length = min(map(len, codes.values()))
  spans = []
  for number, piece in enumerate(_pieces(tokenizer, tokens[:length].tolist())):
    data = ' '.join(f'data-{name}="{code[number]}"' for name, code in codes.items())
    spans.append(f'<b {data}>{html.escape(piece)}</b>')
  more = '<span class="faint"> …</span>' if length < len(tokens) - 1 else ''
  return f'<div class="text">{"".join(spans)}{more}</div>'


def _codes(routed: routing.Routed) -> list[str]:
  """For each token two digits a layer: its strongest expert's colour, and tenths of the gate."""
  visited_LTE = np.where(routed.load_LTE > 0, routed.gate_LTE, -1.0)
  colours_LT = visited_LTE.argmax(-1) % len(figures.COLOURS)
  tenths_LT = np.clip(np.rint(10 * visited_LTE.max(-1)), 1, 9).astype(int)
  return [''.join(f'{c}{t}' for c, t in zip(*pair)) for pair in zip(colours_LT.T, tenths_LT.T)]


def _pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
  """The text of each token; a character of several tokens is the last one's."""
  spelling = text.Continuation(tokenizer, tokens[:1])
  pieces = [tokenizer.bos_token, *(spelling.add([token]) for token in tokens[1:])]
  pieces[-1] += spelling.finish()
  return pieces
