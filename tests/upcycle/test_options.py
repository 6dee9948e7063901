"""The options beyond the paper: off by default, what each computes, whom it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bam_jax import config
from bam_jax.checkpoint import arrays
from bam_jax.errors import UserError
from bam_jax.model import router
from bam_jax.upcycle import merge, rules
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


@pytest.mark.parametrize(
  'name, changes', [('dense', dict(average='first')), ('untied', dict(num_experts=6))]
)
def test_embeddings_of_experts(models, monkeypatch, name, changes):
  """NumPy's singular vectors, whatever the chunks and the mesh; copies have the first source's."""
  dense, rank = models[name], 4
  how = upcycle('btx', embedding_rank=rank, **changes)
  sources = [memory.flat(memory.draw(dense, seed)) for seed in range(3)]
  whole = mix(dense, how)
  monkeypatch.setattr(arrays, 'CHUNK_BYTES', 4096)
  merged, soup = mix(dense, how), mix(dense, upcycle('average', average=how.average))
  meshed = mix(dense, how, mesh=config.Mesh(fsdp=2, expert=how.experts % 2 or 2, tensor=2))
  for end, turned in (('embed/table', np.array), ('unembed/kernel', np.transpose)):
    if end not in soup:
      continue
    path = f'{end.split("/")[0]}/directions'
    for other in (whole, meshed):
      np.testing.assert_array_equal(merged[end], other[end])
      np.testing.assert_array_equal(merged[path], other[path])
    mean_VD, *words_EVr = np.split(turned(merged[end]), 32 + rank * np.arange(how.experts), axis=1)
    np.testing.assert_array_equal(mean_VD, turned(soup[end]))
    for expert, (words_Vr, directions_rD) in enumerate(
      zip(words_EVr, np.split(merged[path], how.experts), strict=True)
    ):
      own_VD = turned(sources[expert if expert < 3 else 0][end])
      u, s, v = np.linalg.svd((own_VD - mean_VD).astype(np.float64), full_matrices=False)
      want_VD = u[:, :rank] * s[:rank] @ v[:rank]
      np.testing.assert_allclose(words_Vr @ directions_rD, want_VD, rtol=0, atol=2e-6)


def test_words_of_one_host_are_read_alone_but_for_the_directions(models):
  dense, how = models['dense'], upcycle('btx', embedding_rank=2)
  sources = [memory.source(dense, memory.draw(dense, seed)) for seed in range(3)]
  wanted, read = memory.specs(rules.mixture_model(dense, how)), []
  parts = {path: tuple((0, n) for n in spec.shape) for path, spec in wanted.items()}
  parts['embed/table'] = (80, 160), (0, 42)
  plan = merge.Merge(sources, how, KEY)
  made = list(merge.regions(plan, wanted, parts, lambda *x: read.append(x)))
  [(index, part)] = [(index, x) for path, index, x in made if path == 'embed/table']
  assert index == (slice(80, 160),)
  np.testing.assert_array_equal(part, mix(dense, how)['embed/table'][80:160])
  assert [x.shape for _, path, _, x in read if path == 'embed/table'] == [(80, 32)] * 3


THREE = (1.0, 2.0, 3.0)


@pytest.mark.parametrize('method, changes, words', [
  ('btx', dict(weights=THREE), ['weights=[1.0, 2.0, 3.0]', "'weighted'"]),
  ('btx', dict(average='weighted', weights=THREE[:2]), ['has 2', "['seed', 'code', 'law']"]),
  ('average', dict(average='weighted', weights=(1.0, 0.0, 2.0)), ['0.0, which is not positive']),
  ('average', dict(num_experts=4), ['num_experts=4', "'average', which has no experts"]),
  ('average', dict(router_init='zero'), ['router_init', 'no router']),
  ('sparse', dict(router_init='ridge'), ['router_init', 'sparse']),
  ('average', dict(embedding_rank=2), ['embedding_rank=2', 'no experts']),
  ('sparse', dict(embedding_rank=2), ['embedding_rank=2', 'single source']),
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


@pytest.mark.parametrize('changes, words', [
  (dict(embedding_rank=5), 'embedding_rank=5 is above d_model / 8 = 4: lower it'),
  (dict(embedding_rank=4, ffn_experts=None), 'embedding_rank=4 has no effect without ffn_experts'),
])  # fmt: skip
def test_ranks_that_are_refused(models, changes, words):
  with pytest.raises(UserError, match=words):
    dataclasses.replace(models['btx'], **changes)


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
