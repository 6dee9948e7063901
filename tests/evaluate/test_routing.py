"""What is counted of the routers, and the page and pictures that show it."""

import html
import re

import numpy as np
import pytest
from rich import progress

from bam_jax.evaluate import comparison, corpus, page, routing, windows
from bam_jax.evaluate.scorer import Routed, Scorer

EXPERTS = ['general', 'code', 'law', 'general']  # as with a copy of the first source


def routed(rng, tokens, top_k=0) -> Routed:
  """Two layers; one gate in ten is 0."""
  gates = rng.dirichlet([0.5] * 4, (2, tokens)) * (rng.random((2, tokens, 4)) < 0.9)
  load = gates if not top_k else np.zeros_like(gates)
  for place in np.ndindex(2, tokens if top_k else 0):
    load[place][np.argsort(-gates[place])[:top_k]] = 1 / top_k
  return Routed(gates.astype(np.float32), load.astype(np.float32))


def test_sums_over_windows(monkeypatch):
  monkeypatch.setattr(routing, 'SHOWN_TOKENS', 11)
  rng = np.random.default_rng(0)
  parts = [{'attention': routed(rng, n), 'ffn': routed(rng, n, top_k=2)} for n in (9, 4, 6)]
  record = routing.Record()
  for number in (2, 0, 1):  # windows of one document, in any order
    record.add(1, 7 + number, parts[number])
  assert record.tokens == 19
  facts = record.facts('general', {'attention': EXPERTS, 'ffn': EXPERTS})
  for router in ('attention', 'ffn'):
    gates, loads = (np.concatenate([part[router][i] for part in parts], axis=1) for i in (0, 1))
    np.testing.assert_array_equal(record.shown(1)[router].gate_LTE, gates[:, :11])
    gates, loads = gates.astype(float), loads.astype(float)
    np.testing.assert_allclose(facts[router]['gate'], gates.mean(1), rtol=1e-6)
    np.testing.assert_allclose(facts[router]['load'], loads.mean(1), rtol=1e-6)
    logs = np.log(np.where(gates > 0, gates, 1))
    np.testing.assert_allclose(facts[router]['entropy'], -(gates * logs).sum(-1).mean(1), rtol=1e-5)
    own = loads.mean(1)[:, 0] + loads.mean(1)[:, 3]
    np.testing.assert_allclose(facts[router]['own_share'], own, rtol=1e-6)
  assert record.facts('math', {'attention': EXPERTS, 'ffn': EXPERTS})['ffn']['own_share'] is None


@pytest.fixture(scope='module')
def shown(saved, tmp_path_factory):
  """The page of two mixtures and a dense model on texts that would break a careless one."""
  folder = tmp_path_factory.mktemp('page')
  nasty = '</b><script>alert("1")</script> <!-- labels --> <!-- x --> naïve \u2603 court & act'
  domains = [corpus.Text('law', [nasty, 'the court shall', 'x']), corpus.Text('code', ['x = 1'])]
  options = comparison.Options(resamples=10)
  paths = [saved(name) for name in ('dense', 'btx', 'bam_kv_experts')]
  entries = comparison.enter(paths, domains, options)
  for entry in entries:
    comparison.score(entry, domains, options, True, progress.Progress(disable=True))
  facts = {'domains': ['law', 'code'], 'rows': comparison.compare(entries, domains, options)}
  return page.write(folder, facts, entries, domains), facts, nasty


def documents_of(page: str) -> list[list[tuple[str, str]]]:
  """Of each document of the page, in order, the attributes and the text of its tokens."""
  found = re.findall('<div class="text">(.*?)</div>', page, re.DOTALL)
  spans = [re.findall('<b ([^>]*)>(.*?)</b>', document, re.DOTALL) for document in found]
  return [[(attrs, html.unescape(text)) for attrs, text in document] for document in spans]


def test_the_page_stands_alone(shown):
  path, _, nasty = shown
  page = path.read_text(encoding='utf-8')
  assert page.count('<script') == page.count('</script>') == 1 and '<!--' not in page
  assert page.count('<img') == 4  # by layer, and a heat map for each router
  loads = re.findall(r'(?:src|href)="([^"]*)"', page)
  assert len(loads) == 4 and all(load.startswith('data:image/png;base64,') for load in loads)
  # Two methods for each of two documents of law and one of code.
  texts = [''.join(text for _, text in document) for document in documents_of(page)]
  assert texts[:4] == ['<|bos|>' + nasty] * 2 + ['<|bos|>the court shall'] * 2 and len(texts) == 6
  assert len(list(path.parent.glob('*.png'))) == 4


def test_tokens_have_their_experts(shown, saved):
  scorer = Scorer(saved('bam_kv_experts'))
  tokens = corpus.Text('law', [shown[2]]).documents(scorer.tokenizer)[0]
  ((_, scored), *_) = scorer.score(list(windows.cut(tokens, 24, 24))[:1], routing=True)
  spans = documents_of(shown[0].read_text(encoding='utf-8'))[1]
  assert len(spans) == len(tokens) - 1 > 24
  for token, (attrs, _) in enumerate(spans[:24]):
    digits = dict(re.findall(r'data-(\w+)="(\d{4})"', attrs))  # two for each of two layers
    assert digits.keys() == scored.routing.keys()
    for router, choices in scored.routing.items():
      for layer in range(2):
        expert, strength = map(int, digits[router][2 * layer : 2 * layer + 2])
        assert choices.load_LTE[layer, token, expert] > 0
        gate = choices.gate_LTE[layer, token]
        assert gate[expert] == gate.max()
        assert strength == min(9, max(1, round(10 * float(gate.max()))))
