"""Prompts to continuations: batches of similar length, padded to shapes that are compiled once.

Legend: B batch, T tokens of a piece, N tokens that a call appends, V vocabulary.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.config.strict import require
from bam_jax.generate.decode import ROWS, Cache, Decoder
from bam_jax.generate.sampling import SamplingParams, sample
from bam_jax.parallel import memory
from bam_jax.upcycle.sources import Source

MAX_STEPS = 16  # of one call of `decode`
PIECE = 512  # tokens of a prompt that are read at once
BUCKET = 32  # tokens, the least distance of two buckets
NO_TOKEN = -1  # in place of a token, of a row that is finished
DECODE_LOOP = 'decode_loop'  # the scope of the loop over tokens, in a compiled program's text


class Program(NamedTuple):
  """What the programs are compiled for, beside shapes."""

  model: config.Model
  dtype: str  # of weights, activations and cache
  mesh: jax.sharding.Mesh | None
  sampling: tuple[bool, int, bool] = SamplingParams().static()
  num_words: int | None = None  # words that may be chosen, the first of them; None is all


class State(NamedTuple):
  """A batch on the devices; its buffers are donated."""

  cache: Cache
  first_B: jax.Array  # int32, slots of padding in front of each row
  filled: jax.Array  # int32, slots in use
  token_B: jax.Array  # int32, chosen and not read yet; NO_TOKEN if finished
  noise_B2: jax.Array  # uint32, a hash of what each row's draws depend on: seed, prompt, sample
  temperature: jax.Array
  top_p: jax.Array
  stops: jax.Array  # int32, tokens that finish a row


REST = ROWS, P(), ROWS, ROWS, P(), P(), P()  # specs but for the cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(program: Program, params: Any, state: State, tokens_BT: jax.Array) -> State:
  """Reads a piece of the prompts, int32; the state's token follows it."""
  decoder = Decoder(program.model, program.dtype, program.mesh)

  def run(params, state, tokens_BT):
    return _advance(decoder, program, params, state, tokens_BT, state.first_B)

  of_params, of_cache = decoder.specs()
  of_state = State(of_cache, *REST)
  spread = decoder.layout.spread(run, (of_params, of_state, ROWS), of_state)
  return spread(params, state, tokens_BT)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
  program: Program, params: Any, state: State, finished_B: jax.Array, steps: jax.Array
) -> tuple[State, jax.Array]:
  """Appends `steps` tokens (int32, at most MAX_STEPS) to each row but `finished_B` (bool).

  Returns the state, and the tokens BN that follow the one before, of which the first `steps` count.
  """
  decoder = Decoder(program.model, program.dtype, program.mesh)

  def run(params, state, finished_B, steps):
    def step(number, carry):
      state, new_BN = carry
      over_B = (state.token_B == NO_TOKEN) | (state.token_B[:, None] == state.stops).any(1)
      # The token of a finished row is padding, which visits no expert.
      first_B = jnp.where(over_B, state.filled + 1, state.first_B)
      tokens_B1 = jnp.maximum(state.token_B, 0)[:, None]
      new = _advance(decoder, program, params, state, tokens_B1, first_B)
      new = new._replace(token_B=jnp.where(over_B, NO_TOKEN, new.token_B))
      column_B1 = new.token_B[:, None]
      return new, jax.lax.dynamic_update_slice_in_dim(new_BN, column_B1, number, axis=1)

    state = state._replace(token_B=jnp.where(finished_B, NO_TOKEN, state.token_B))
    new_BN = jnp.full((len(finished_B), MAX_STEPS), NO_TOKEN, jnp.int32)
    with jax.named_scope(DECODE_LOOP):
      return jax.lax.fori_loop(0, steps, step, (state, new_BN))

  of_params, of_cache = decoder.specs()
  of_state = State(of_cache, *REST)
  spread = decoder.layout.spread(run, (of_params, of_state, ROWS, P()), (of_state, ROWS))
  return spread(params, state, finished_B, steps)


def _advance(decoder, program: Program, params, state: State, tokens_BT, first_B) -> State:
  """Reads tokens and chooses the next one."""
  logits_BV, cache = decoder.read(params, state.cache, tokens_BT, first_B, state.filled)
  if program.num_words is not None:
    words_V = jnp.arange(logits_BV.shape[1])
    logits_BV = jnp.where(words_V < program.num_words, logits_BV, -jnp.inf)
  filled = state.filled + tokens_BT.shape[1]
  # Of a row's own length and no more: its draws do not depend on what it shares a batch with.
  fold_in = jax.random.fold_in
  key = lambda noise, length: fold_in(fold_in(jax.random.key(noise[0]), noise[1]), length)
  keys_B = jax.vmap(key)(state.noise_B2, filled - state.first_B)
  token_B = sample(logits_BV, keys_B, program.sampling, state.temperature, state.top_p)
  return state._replace(cache=cache, filled=filled, token_B=token_B)


def abstract_arguments(decoder: Decoder, batch: int, slots: int) -> tuple:
  """Shapes and shardings of the arguments of `decode`, to compile it for any devices."""
  abstract = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=decoder.sharding(spec))
  first_B, noise_B2 = np.zeros(batch, np.int32), np.zeros((batch, 2), np.uint32)
  rest = map(abstract, _rest(first_B, noise_B2, SamplingParams(), ()), REST)
  state = State(decoder.abstract_cache(batch, slots), *rest)
  more = abstract(np.zeros(batch, bool), ROWS), abstract(np.int32(0), P())
  return decoder.abstract_params(), state, *more


def _rest(first_B, noise_B2, params: SamplingParams, stops: Sequence[int]) -> tuple:
  """The state before anything is read, but for its cache."""
  numbers = np.float32(params.temperature or 1.0), np.float32(params.top_p)
  tokens, stops = np.full_like(first_B, NO_TOKEN), np.asarray(stops or (NO_TOKEN,), np.int32)
  return first_B, np.int32(0), tokens, noise_B2, *numbers, stops


class Row(NamedTuple):
  """One continuation to make."""

  prompt: Sequence[int]  # tokens, at least one
  sample: int = 0  # index among the samples of a prompt, each drawn independently


class Generator:
  """A model on its devices, ready to continue prompts."""

  def __init__(
    self,
    model: config.Model,
    read: Callable,
    *,
    dtype: str = 'float32',
    mesh: jax.sharding.Mesh | None = None,
    stops: Sequence[int] = (),
    num_words: int | None = None,
  ):
    """Puts the parameters on the devices, by default one; tokens in `stops` finish a row.

    `read` is (path, index) -> that region of a parameter, the others are those of `Program`.
    """
    self.decoder = Decoder(model, dtype, mesh)
    self.params = self.decoder.place(read)
    self._stops = tuple(stops)
    self._program = Program(self.decoder.model, dtype, mesh, num_words=num_words)

  def generate(
    self,
    rows: Sequence[Row],
    max_new_tokens: int,
    params: SamplingParams = SamplingParams(),  # noqa: B008
    *,
    seed: int = 0,
    batch_size: int = 8,
    every: int = MAX_STEPS,
    watch: Callable[[int, list[int]], bool] = lambda number, tokens: False,
  ) -> list[list[int]]:
    """The continuations of all rows, in their order, without what finished them.

    A row's draws depend on `seed`, its prompt and its sample alone. `watch` is called with a row's
    index and its new tokens, at most `every` (up to MAX_STEPS); true finishes the row. UserError
    when keys and values of a batch do not fit into memory.
    """
    made: list[list[int]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].prompt))
    for numbers in itertools.batched(order, batch_size):
      running = np.ones(len(numbers), bool)
      batch = [rows[number] for number in numbers]
      for new_BN in self._batch(batch, max_new_tokens, params, seed, every, running):
        for row, number in enumerate(numbers):
          if running[row]:
            tokens = new_BN[row].tolist()
            end = next((i for i, token in enumerate(tokens) if token in self._stops), None)
            made[number] += tokens[:end]
            watched = tokens[:end] and watch(number, tokens[:end])
            running[row] = end is None and not watched
    return made

  def _batch(
    self, rows, max_new_tokens, params: SamplingParams, seed, every, running
  ) -> Iterator[np.ndarray]:
    """New tokens BN, for as long as a row is `running`, which the caller updates."""
    program = self._program._replace(sampling=params.static())
    state, pieces = self._start(rows, max_new_tokens, params, seed)
    for tokens_BT in pieces:
      state = prefill(program, self.params, state, tokens_BT)
    yield np.asarray(state.token_B)[:, None]
    for done in range(1, max_new_tokens, every):
      if not running.any():
        return
      steps = min(every, max_new_tokens - done)
      finished_B = np.ones(len(state.token_B), bool)
      finished_B[: len(running)] = ~running
      state, new_BN = decode(program, self.params, state, finished_B, jnp.int32(steps))
      yield np.asarray(new_BN)[:, :steps]

  def _start(self, rows: Sequence[Row], max_new_tokens: int, params: SamplingParams, seed: int):
    """The state of a batch before anything is read, and its prompts in pieces BT."""
    shards = self.decoder.layout.row_shards
    batch = shards * 2 ** math.ceil(math.log2(-(-len(rows) // shards)))
    length, piece, slots = padded_shape(max(len(row.prompt) for row in rows), max_new_tokens)
    self._check_room(batch, slots)
    tokens_BT = np.zeros((batch, length), np.int32)
    first_B = np.full(batch, length, np.int32)
    noise_B2 = np.zeros((batch, 2), np.uint32)
    for number, row in enumerate(rows):
      first_B[number] = length - len(row.prompt)
      tokens_BT[number, first_B[number] :] = row.prompt
      content = np.asarray([seed, row.sample, *row.prompt], np.int64).tobytes()
      noise_B2[number] = np.frombuffer(hashlib.sha256(content).digest()[:8], np.uint32)
    cache = self.decoder.empty_cache(batch, slots)
    rest = _rest(first_B, noise_B2, params, self._stops)
    put = lambda x, spec: jax.device_put(x, self.decoder.sharding(spec))
    return State(cache, *map(put, rest, REST)), np.split(tokens_BT, length // piece, axis=1)

  def _check_room(self, batch: int, slots: int) -> None:
    needed = memory.device_bytes(self.decoder.abstract_cache(batch, slots))
    free = memory.free_bytes() or needed
    wrong = f'Keys and values of {batch} x {slots:,} tokens require {needed / 1e9:,.1f} GB, but'
    fix = f'{free / 1e9:,.1f} GB are free: lower --batch_size or --max_new_tokens.'
    require(needed <= free, f'{wrong} {fix}')


def load(source: Source, dtype: str, mesh: jax.sharding.Mesh) -> Generator:
  """An opened checkpoint, read an array at a time; UserError if it is damaged."""
  source.check()
  model, read, tokenizer = source.meta.model, source.reader.read, source.tokenizer()
  stops, words = [tokenizer.eos_id], tokenizer.vocab_size
  return Generator(model, read, dtype=dtype, mesh=mesh, stops=stops, num_words=words)


def padded_shape(longest: int, max_new_tokens: int) -> tuple[int, int, int]:
  """Tokens that prompts are padded to, those of a piece of them, and the cache's slots."""
  length = bucket(longest) if longest <= PIECE else -(-longest // PIECE) * PIECE
  return length, min(length, PIECE), bucket(length + max_new_tokens)


def bucket(tokens: int) -> int:
  """The next multiple of BUCKET, from 256 on of 32, 64, 128 and so on: at most a quarter larger."""
  step = max(BUCKET, 2 ** (math.ceil(math.log2(max(tokens, 1))) - 3))
  return -(-tokens // step) * step
