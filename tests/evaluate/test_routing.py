"""What is counted of the routers, and the page and pictures that show it."""

import base64
import json
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


def data_of(path) -> dict:
  """The object that the page draws."""
  return json.loads(re.search('const data = (.*);\n', path.read_text(encoding='utf-8'))[1])


def test_the_page_stands_alone(shown):
  path, facts, nasty = shown
  page, data = path.read_text(encoding='utf-8'), data_of(path)
  # What is drawn is all in one literal, without a tag, and nothing is loaded.
  assert page.count('<script') == page.count('</script>') == 1 and '<!--' not in page
  assert not re.search(r'(?:src|href)=', page)
  assert data['labels'] == [row['label'] for row in facts['rows']]
  assert [line[:2] for line in data['shares']] == [
    [row['label'], router] for row in facts['rows'] for router in row['routing'] or {}
  ]
  pictures = [base64.b64decode(picture) for _, picture in data['pictures']]
  assert len(pictures) == 4  # by layer, and a heat map for each router
  assert sorted(pictures) == sorted(file.read_bytes() for file in path.parent.glob('*.png'))
  # Two methods for each of two documents of law and one of code.
  texts = [''.join(one['pieces']) for one in data['documents']]
  assert texts[:4] == ['<|bos|>' + nasty] * 2 + ['<|bos|>the court shall'] * 2 and len(texts) == 6


def test_tokens_have_their_experts(shown, saved):
  scorer = Scorer(saved('bam_kv_experts'))
  tokens = corpus.Text('law', [shown[2]]).documents(scorer.tokenizer)[0]
  ((_, scored), *_) = scorer.score(list(windows.cut(tokens, 24, 24))[:1], routing=True)
  document = data_of(shown[0])['documents'][1]
  assert len(document['pieces']) == len(tokens) - 1 > 24
  assert document['choices'].keys() == scored.routing.keys()
  for router, choices in scored.routing.items():
    drawn = document['choices'][router]
    for layer, token in np.ndindex(2, 24):
      expert, gate = drawn['expert'][layer][token], choices.gate_LTE[layer, token]
      assert choices.load_LTE[layer, token, expert] > 0
      assert gate[expert] == gate.max()
      assert drawn['gate'][layer][token] == pytest.approx(float(gate.max()), abs=0.0051)
