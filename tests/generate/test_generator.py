"""Continuations are those of the uncached model, whatever the batch, the mesh and the buckets."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.generate import decode
from bam_jax.generate import generator as generator_lib
from bam_jax.generate.generator import Generator, Row
from bam_jax.generate.sampling import SamplingParams
from bam_jax.model import transformer
from bam_jax.parallel import sharding
from tests.generate.conftest import reader

LENGTH = 24  # the most tokens of a row in these tests
DRAWN = SamplingParams(1.0, top_k=100, top_p=0.95)


@pytest.fixture(scope='module')
def start(models):
  """Parameters of each model, scaled so that the largest score stands out."""

  @functools.cache
  def make(name: str) -> dict:
    network = transformer.Network(models[name], config.Compute())
    params = jax.device_get(jax.jit(network.init)(jax.random.key(1)))
    return jax.tree.map(lambda x: 2 * x, params)

  return make


@pytest.fixture(scope='module')
def build(models, start):
  """The function (name, options) -> a Generator; kept, for its programs are compiled."""

  @functools.cache
  def make(name: str, shape=(1, 1, 1, 1), stops=()) -> Generator:
    mesh = sharding.make_mesh(config.Mesh(*shape))
    return Generator(models[name], reader(start(name)), mesh=mesh, stops=stops)

  return make


@pytest.fixture(scope='module')
def rows() -> list[Row]:
  rng = np.random.default_rng(0)
  return [Row(rng.integers(0, 320, n).tolist()) for n in (9, 1, 14, 4, 2)]


@pytest.fixture(scope='module')
def greedy(models, start):
  """The function (name, prompt, count) -> the tokens that the uncached model gives."""

  @functools.cache
  def scores(name):
    network = transformer.Network(models[name], config.Compute())

    @jax.jit
    def run(params, tokens, number):
      there = jnp.arange(LENGTH)[None]
      hidden, _ = network.hidden(params, tokens, (there < number).astype(jnp.int32), there)
      return network.logits(params, hidden[0, number - 1])

    return run

  def make(name, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
      padded = np.zeros((1, LENGTH), np.int32)
      padded[0, : len(tokens)] = tokens
      tokens.append(int(scores(name)(start(name), padded, len(tokens)).argmax()))
    return tokens[len(prompt) :]

  return make


ONE = (1, 1, 1, 1)
MORE = [
  ('dense', ONE), ('untied', (2, 2, 1, 1)), ('btx', (2, 2, 2, 1)), ('bam_shared_kv', (1, 2, 2, 2)),
  ('routed_attention', (1, 1, 4, 1)), ('bam_kv_experts', (2, 2, 2, 1)),
  ('bam_kv_experts', (1, 1, 4, 1)),
]  # fmt: skip
CASES = [('bam_kv_experts', ONE), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]


@pytest.mark.parametrize('name, shape', CASES)
def test_greedy_tokens_are_the_uncached_models(build, greedy, rows, name, shape):
  made = build(name, shape).generate(rows, 10)
  assert made == [greedy(name, row.prompt, 10) for row in rows]
  assert len({tuple(tokens) for tokens in made}) > 1


def test_a_row_does_not_depend_on_its_batch(build, rows):
  model = build('bam_kv_experts')
  rows = [*rows, Row(rows[0].prompt, sample=1)]
  together = model.generate(rows, 10, DRAWN, seed=3)
  assert together == model.generate(rows[::-1], 10, DRAWN, seed=3, batch_size=2)[::-1]
  assert together[:2] == model.generate(rows[:2], 10, DRAWN, seed=3)
  # Samples and seeds differ, and a seed is a seed.
  assert together[0] != together[-1]
  assert together != model.generate(rows, 10, DRAWN, seed=4)
  assert together == model.generate(rows, 10, DRAWN, seed=3)


@pytest.mark.slow
def test_draws_do_not_depend_on_the_mesh(build, rows):
  one = build('bam_kv_experts').generate(rows, 10, DRAWN)
  assert one == build('bam_kv_experts', (2, 2, 2, 1)).generate(rows, 10, DRAWN)


def test_a_stop_token_ends_its_row_alone(build, rows):
  without = build('bam_kv_experts').generate(rows, 10)
  stop = without[0][4]
  made = build('bam_kv_experts', stops=(stop,)).generate(rows, 10)
  assert made == [t[: t.index(stop)] if stop in t else t for t in without]
  assert made[0] != without[0] and any(tokens == full for tokens, full in zip(made, without))


def test_who_watches_sees_the_tokens_and_can_end_a_row(build, rows):
  model, seen = build('bam_kv_experts'), [[] for _ in rows]
  whole = model.generate(rows, 10)

  def watch(number, tokens):
    assert len(tokens) == (3 if seen[number] else 1)
    seen[number] += tokens
    return number == 2 and len(seen[number]) > 1

  made = model.generate(rows, 10, every=3, watch=watch)
  assert made == seen and made[2] == whole[2][:4]
  assert [made[i] for i in (0, 1, 3, 4)] == [whole[i] for i in (0, 1, 3, 4)]


def test_a_bucket_is_compiled_once(build, rows, monkeypatch):
  model, traced, read = build('bam_kv_experts'), [], decode.Decoder.read

  def counting(self, params, cache, tokens_BT, *rest):
    traced.append(tokens_BT.shape)
    return read(self, params, cache, tokens_BT, *rest)

  model.generate(rows, 10)
  monkeypatch.setattr(decode.Decoder, 'read', counting)
  # Other prompts, lengths, numbers of rows and of tokens in the same buckets.
  model.generate([Row(row.prompt[::-1] + [7]) for row in rows], 16)
  model.generate([*rows, *rows[:3]], 1)
  assert not traced
  model.generate([Row([5] * 33)] * 5, 3)
  assert set(traced) == {(8, 64), (8, 1)}


@pytest.mark.slow
def test_a_long_prompt_is_read_in_pieces(build, models, start):
  """2,500 tokens: five pieces of 512, attention in blocks, padding in front of the shorter."""
  rng = np.random.default_rng(2)
  rows = [Row(rng.integers(0, 320, n).tolist()) for n in (2500, 1100)]
  network = transformer.Network(models['bam_kv_experts'], config.Compute())
  wanted = []
  for row in rows:
    tokens = np.asarray([row.prompt], np.int32)
    there = np.arange(tokens.size, dtype=np.int32)[None]
    params = start('bam_kv_experts')
    hidden, _ = jax.jit(network.hidden)(params, tokens, np.ones_like(tokens), there)
    wanted.append(int(network.logits(params, hidden[0, -1]).argmax()))
  assert [tokens[0] for tokens in build('bam_kv_experts').generate(rows, 2)] == wanted


@pytest.mark.slow
def test_words_past_the_tokenizers_are_never_chosen(models, start, rows):
  few = Generator(models['dense'], reader(start('dense')), dtype='bfloat16', num_words=11)
  made = few.generate(rows[:2], 12, SamplingParams(5.0))
  assert all(len(tokens) == 12 and max(tokens) < 11 for tokens in made)


def test_what_memory_cannot_hold_is_refused(build, rows):
  with pytest.raises(UserError, match=r'require [\d,.]+ GB, but [\d,.]+ GB are free: lower'):
    build('bam_kv_experts').generate(rows, 10**11)


def test_buckets_are_few_and_near():
  sizes = [generator_lib.bucket(number) for number in range(1, 5000)]
  assert all(n <= size < max(n + 32, 1.25 * n + 1) for n, size in enumerate(sizes, 1))
  assert sizes == sorted(sizes) and len(set(sizes)) < 32
  for longest in (1, 16, 17, 300, 512, 513, 5000):
    length, piece, slots = generator_lib.padded_shape(longest, 20)
    assert length >= longest and length % piece == 0 and slots >= length + 20


def written(model: Generator, batch: int, slots: int) -> jax.stages.Compiled:
  arguments = generator_lib.abstract_arguments(model.decoder, batch, slots)
  return generator_lib.decode.lower(model._program, *arguments).compile()


def test_a_step_copies_neither_cache_nor_weights(build):
  model, slots = build('bam_kv_experts'), 8192
  program = written(model, 1, slots)
  abstract = model.decoder.abstract_cache(1, slots)
  one = jax.tree.leaves(abstract)[0].size * 4
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes >= 16 * one
  # What a step needs beside are scores, four heads of a quarter of an array: not one of 16 arrays.
  assert memory.temp_size_in_bytes < 3 * one
  shape = ','.join(map(str, jax.tree.leaves(abstract)[0].shape))
  assert not re.findall(rf'f32\[{shape}\]\S* copy\(', program.as_text())


@pytest.mark.slow
@pytest.mark.parametrize('name', ['bam_kv_experts', 'btx'])
def test_a_layer_adds_once(build, name):
  """On devices with an expert each: a sum a layer, one for the embedding, and the scores."""
  model = build(name, (1, 1, 4, 1))
  text = written(model, 2, 32).as_text()
  assert len(re.findall(r' all-reduce(?:-start)?\(', text)) == model.decoder.model.num_layers + 1
  assert len(re.findall(r' all-gather(?:-start)?\(', text)) == 1
  assert not re.findall(r' (?:all-to-all|reduce-scatter|collective-permute)\(', text)
