"""The options beyond the paper: off by default, what each computes, whom it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.model import router
from bam_jax.upcycle import rules
from tests.upcycle import memory
from tests.upcycle.memory import KEY, upcycle


def mix(dense, mixed: config.Upcycle, key=KEY, shift: float = 0.0, **more) -> dict:
  """The merged arrays by path."""
  sources = [memory.draw(dense, seed, shift) for seed in range(len(mixed.sources))]
  return memory.flat(memory.mix(sources, dense, mixed, key, **more))


def differing(one: dict, other: dict) -> set[str]:
  assert one.keys() == other.keys()
  return {path for path in one if not np.array_equal(one[path], other[path])}


def averaged(dense, method: str) -> set[str]:
  table = rules.rules(rules.mixture_model(dense, upcycle(method)))
  return {rule.target for rule in table if rule.how == 'mean'}


@pytest.mark.parametrize(
  'method', ['bam_shared_kv', pytest.param('average', marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('weights', [(1.0, 2.0, 5.0), None], ids=str)
def test_a_weighted_mean_or_the_first_source(models, method, weights):
  dense = models['untied']
  kind = dict(average='weighted', weights=weights) if weights else dict(average='first')
  merged, plain = mix(dense, upcycle(method, **kind)), mix(dense, upcycle(method))
  sources = [memory.flat(memory.draw(dense, seed)) for seed in range(3)]
  for path in averaged(dense, method):
    arrays = np.stack([source[path] for source in sources]).astype(np.float64)
    want = np.average(arrays, axis=0, weights=weights or (1, 0, 0))
    np.testing.assert_allclose(merged[path], want, rtol=1e-5, atol=1e-8, err_msg=path)
    assert merged[path].dtype == np.float32
  assert differing(merged, plain) <= averaged(dense, method)


def test_routers_of_zeros_and_given_ones(models):
  dense, router = models['dense'], np.arange(2 * 32 * 5, dtype=np.float32).reshape(2, 32, 5)
  merged = mix(dense, upcycle('bam_kv_experts', router_init='zero'))
  for path in ('blocks/attention/router', 'blocks/ffn/router'):
    assert merged[path].shape == (2, 32, 5) and not merged[path].any()
  mixed = upcycle('btx', router_init='centroids')
  merged = mix(dense, mixed, routers={'blocks/ffn/router': router})
  np.testing.assert_array_equal(merged['blocks/ffn/router'], router)
  assert differing(merged, mix(dense, upcycle('btx'))) == {'blocks/ffn/router'}


THREE = (1.0, 2.0, 3.0)


@pytest.mark.parametrize('method, changes, words', [
  ('btx', dict(weights=THREE), ['weights=[1.0, 2.0, 3.0]', "'weighted'"]),
  ('btx', dict(average='weighted', weights=THREE[:2]), ['has 2', "['seed', 'code', 'law']"]),
  ('average', dict(average='weighted', weights=(1.0, 0.0, 2.0)), ['0.0, which is not positive']),
  ('average', dict(num_experts=4), ['num_experts=4', "'average', which has no experts"]),
  ('average', dict(router_init='zero'), ['router_init', 'no router']),
  ('sparse', dict(router_init='ridge'), ['router_init', 'sparse']),
  ('sparse', dict(norms='fold'), ["norms='fold'", 'single source']),
  ('bam_kv_experts', dict(norms='fold', router_init='centroids'), ["norms='mean', or 'random'"]),
  ('btx', dict(router_init='zero', router_scale=2.0), ['router_scale=2.0']),
], ids=str)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_a_sentence(method, changes, words):
  with pytest.raises(UserError) as caught:
    upcycle(method, **changes)
  message = str(caught.value)
  assert message.endswith('.') and '\n' not in message
  assert all(word in message for word in words), message


@pytest.mark.parametrize('method, changes, word', [
  ('btx', {}, 'a parallel block'),
  ('bam_kv_experts', dict(block='sequential', norm_place='post'), 'before the parts'),
])  # fmt: skip
def test_norms_that_cannot_be_folded(models, method, changes, word):
  with pytest.raises(UserError, match=f'{word}.*set norms|{word}.*or norms'):
    dense = dataclasses.replace(models['dense'], **changes)
    rules.mixture_model(dense, upcycle(method, norms='fold'))


@pytest.mark.parametrize('k, renormalize', [(1, True), (1, False), (2, True)])
def test_routers_that_the_text_cannot_train_are_named(models, k, renormalize):
  """The warning is given where the gates have no gradient, and nowhere else."""
  logits_E = jnp.asarray([0.3, -0.2, 1.0, 0.1])
  first = lambda logits_E: router.top_k(jax.nn.softmax(logits_E), k, renormalize)[0][0]
  stuck = not np.abs(jax.grad(first)(logits_E)).max() > 1e-3
  chosen = dict(top_k=k, attention_top_k=k, renormalize=renormalize)
  how = config.Upcycle(('a', 'b'), 'bam_kv_experts', **chosen)
  warning = rules.warning(rules.mixture_model(models['dense'], how))
  assert bool(warning) == stuck == ('attention and FFN choose one expert' in warning)
