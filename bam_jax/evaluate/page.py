"""One HTML page of what the routers do, with everything inside: it needs neither files nor network.

Text and names are escaped, and the page's own policy forbids it to load anything.
"""

import base64
import html
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colors

from bam_jax.data.tokenizer import Tokenizer
from bam_jax.evaluate import corpus, routing
from bam_jax.evaluate.comparison import Entry
from bam_jax.generate import text
from bam_jax.reports import figures

PAGE = Path(__file__).with_name('page.html')
LEFT = ' class="name"'  # of a table's cells


def write(
  folder: Path,
  facts: Mapping[str, Any],
  entries: Sequence[Entry],
  domains: Sequence[corpus.Domain],
) -> Path:
  """Draws the pictures into the folder and writes `routing.html`; returns its path.

  Args:
    folder: exists.
    facts: of `--json`, with routing.
    entries: that were scored, in the same order.
    domains: that were scored.
  """
  routed = [(row, entry) for row, entry in zip(facts['rows'], entries) if row['routing']]
  rows = [row for row, _ in routed]
  routers = list(dict.fromkeys(name for row in rows for name in row['routing']))
  layers = max(entry.meta.model.num_layers for _, entry in routed)
  body = [
    '<h1>Where the routers send tokens</h1>',
    f'<p>{_escape(", ".join(row["label"] for row in facts["rows"]))}. Tokens count where the next'
    ' one is scored.</p>',
    '<h2>Own specialists</h2>',
    "<p>Share of a domain's tokens with the expert that its specialist became, mean over the"
    ' layers: of attention the mean gate, of the FFN the choices.</p>',
    _shares(facts['domains'], rows),
  ]
  for file, title in _draw(folder, rows):
    data = base64.b64encode((folder / file).read_bytes()).decode()
    body += [f'<h2>{_escape(title)}</h2>']
    body += [f'<img alt="{_escape(title)}" src="data:image/png;base64,{data}">']
  choices = [
    _select('router', routers, routers),
    _select('layer', range(layers), range(1, layers + 1)),
    '<span class="faint">The colour is the expert, its strength the gate.</span>',
  ]
  body += ['<h2>Token by token</h2>', f'<nav>{" ".join(choices)}</nav>']
  for domain in domains:
    body.append(f'<h3>{_escape(domain.name)}</h3>')
    for number in range(min(routing.SHOWN, len(domain.byte_counts))):
      for row, entry in routed:
        shown = entry.records[domain.name].shown(number)
        tokens = domain.documents(entry.tokenizer)[number]
        body += [_legend(row, number), _text(entry.tokenizer, tokens, shown)]
  path = folder / 'routing.html'
  colours = [' '.join(str(round(255 * part)) for part in colors.to_rgb(c)) for c in figures.COLOURS]
  page = PAGE.read_text(encoding='utf-8').replace('COLOURS', json.dumps(colours), 1)
  page = page.replace('<!-- BODY -->', '\n'.join(body), 1)
  path.write_text(page, encoding='utf-8', errors='replace')
  return path


def _draw(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
  """Draws all pictures of the rows with routers; the file and the title of each."""
  figures.routers_by_layer(folder / 'by_layer.png', rows)
  made = [('by_layer.png', 'Layer by layer')]
  for number, row in enumerate(rows):
    for router, by_domain in row['routing'].items():
      made.append((f'{number}_{router}.png', f'{row["label"]}: {figures.router_name(router)}'))
      loads = {domain: facts['load'] for domain, facts in by_domain.items()}
      shown = row | {'experts': row['experts'][router], 'routing': {router: loads}}
      figures.routing(folder / made[-1][0], shown)
  return made


def _escape(words: Any) -> str:
  return html.escape(str(words))


def _select(name: str, values: Iterable, shown: Iterable) -> str:
  options = [f'<option value="{_escape(v)}">{_escape(s)}</option>' for v, s in zip(values, shown)]
  return f'<label>{name} <select id="{name}">{"".join(options)}</select></label>'


def _shares(domains: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
  heads = [f'<th{LEFT}>checkpoint</th><th{LEFT}>router</th>']
  lines = [''.join([*heads, *(f'<th>{_escape(name)}</th>' for name in domains)])]
  for row in rows:
    for router, by_domain in row['routing'].items():
      shares = ''.join(f'<td>{routing.own_share(by_domain[name])}</td>' for name in domains)
      lines.append(f'<td{LEFT}>{_escape(row["label"])}</td><td{LEFT}>{router}</td>{shares}')
  return '<table>' + ''.join(f'<tr>{line}</tr>' for line in lines) + '</table>'


def _legend(row: Mapping[str, Any], number: int) -> str:
  experts = max(row['experts'].values(), key=len)
  shown = [
    f'<span style="background: {colour}88">{_escape(name)}</span>'
    for name, colour in zip(experts, itertools.cycle(figures.COLOURS))
  ]
  title = f'{_escape(row["label"])}, document {number + 1}'
  return f'<p class="legend">{title} {"".join(shown)}</p>'


def _text(tokenizer: Tokenizer, tokens: np.ndarray, shown: Mapping[str, routing.Routed]) -> str:
  """A document's first tokens; each holds for every router its expert and gate, layer by layer."""
  codes = {name: _codes(routed) for name, routed in shown.items()}
  length = min(map(len, codes.values()))
  spans = []
  for number, piece in enumerate(_pieces(tokenizer, tokens[:length].tolist())):
    data = ' '.join(f'data-{name}="{code[number]}"' for name, code in codes.items())
    spans.append(f'<b {data}>{_escape(piece)}</b>')
  more = '<span class="faint"> …</span>' if length < len(tokens) - 1 else ''
  return f'<div class="text">{"".join(spans)}{more}</div>'


def _codes(routed: routing.Routed) -> list[str]:
  """For each token two digits a layer: its strongest expert's colour, and tenths of the gate."""
  expert_LT, gate_LT = routing.strongest(routed)
  tenths_LT = np.clip(np.rint(10 * gate_LT), 1, 9).astype(int)
  colours_LT = expert_LT % len(figures.COLOURS)
  return [''.join(f'{c}{t}' for c, t in zip(*pair)) for pair in zip(colours_LT.T, tenths_LT.T)]


def _pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
  """The text of each token; a character of several tokens is the last one's."""
  spelling = text.Continuation(tokenizer, tokens[:1])
  pieces = [tokenizer.bos_token, *(spelling.add([token]) for token in tokens[1:])]
  pieces[-1] += spelling.finish()
  return pieces
