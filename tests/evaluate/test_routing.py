"""What is counted of the routers."""

import numpy as np

from bam_jax.evaluate import routing
from bam_jax.evaluate.scorer import Routed

EXPERTS = ['general', 'code', 'law', 'general']  # as with a copy of the first source


def routed(rng, tokens, top_k=0) -> Routed:
  """Two layers; one gate in ten is 0."""
  gates = rng.dirichlet([0.5] * 4, (2, tokens)) * (rng.random((2, tokens, 4)) < 0.9)
  load = gates if not top_k else np.zeros_like(gates)
  for place in np.ndindex(2, tokens if top_k else 0):
    load[place][np.argsort(-gates[place])[:top_k]] = 1 / top_k
  return Routed(gates.astype(np.float32), load.astype(np.float32))


def test_sums_over_windows():
  rng = np.random.default_rng(0)
  parts = [{'attention': routed(rng, n), 'ffn': routed(rng, n, top_k=2)} for n in (9, 4, 6)]
  record = routing.Record()
  for part in parts:
    record.add(part)
  assert record.tokens == 19
  facts = record.facts('general', {'attention': EXPERTS, 'ffn': EXPERTS})
  for router in ('attention', 'ffn'):
    gates, loads = (np.concatenate([part[router][i] for part in parts], axis=1) for i in (0, 1))
    gates, loads = gates.astype(float), loads.astype(float)
    np.testing.assert_allclose(facts[router]['gate'], gates.mean(1), rtol=1e-6)
    np.testing.assert_allclose(facts[router]['load'], loads.mean(1), rtol=1e-6)
    logs = np.log(np.where(gates > 0, gates, 1))
    np.testing.assert_allclose(facts[router]['entropy'], -(gates * logs).sum(-1).mean(1), rtol=1e-5)
    own = loads.mean(1)[:, 0] + loads.mean(1)[:, 3]
    np.testing.assert_allclose(facts[router]['own_share'], own, rtol=1e-6)
  assert record.facts('math', {'attention': EXPERTS, 'ffn': EXPERTS})['ffn']['own_share'] is None
