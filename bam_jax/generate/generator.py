"""Prompts to continuations: batches of similar length, padded to shapes that are compiled once.

Legend: B batch, T tokens of a piece.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.generate import programs, sampling
from bam_jax.model import arithmetic
from bam_jax.model import decoder as decoder_lib
from bam_jax.parallel import memory

PIECE = 512  # tokens of a prompt that are read at once
STEP = 32  # tokens, the least between two buckets
STOPS = 4  # room for tokens that finish a row


class Row(NamedTuple):
  """One continuation to make."""

  prompt: Sequence[int]  # tokens, at least one
  sample: int = 0  # its number among those of the same prompt: draws of its own


# Called with a row's index and its new tokens; true finishes the row.
Watch = Callable[[int, list[int]], bool]


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
    """Puts the parameters on the devices.

    Args:
      model: any variant.
      read: (path, index) -> the region of a parameter; `resident.reader` makes one of a tree.
      dtype: 'float32' or 'bfloat16', of weights, activations and cache.
      mesh: default: one device.
      stops: at most `STOPS` tokens that finish a row.
      num_words: words that may be chosen, the first of them; default: all.
    """
    self.decoder = decoder_lib.Decoder(model, dtype, mesh)
    self.params = self.decoder.place(read)
    self._mesh, self._num_words = mesh, num_words
    self._stops = np.full(STOPS, programs.NONE, np.int32)
    self._stops[: len(stops)] = stops

  def generate(
    self,
    rows: Sequence[Row],
    max_new_tokens: int,
    options: sampling.Sampling = sampling.Sampling(),  # noqa: B008
    *,
    seed: int = 0,
    batch_size: int = 8,
    every: int = programs.WRITES,
    watch: Watch = lambda number, tokens: False,
  ) -> list[list[int]]:
    """The continuations of all rows, in their order, without what finished them.

    Args:
      rows: any number, of any lengths.
      max_new_tokens: of each.
      options: how tokens are chosen.
      seed: of all draws; a row's depend on it, on its prompt and on its sample, on nothing else.
      batch_size: the most rows at once.
      every: tokens of a row between two calls of `watch`, after the first, at most `WRITES`.
      watch: sees a row's new tokens as they come, and may finish it.

    Raises:
      UserError: keys and values of a batch do not fit into memory.
    """
    knobs = programs.Knobs(
      jnp.float32(options.temperature or 1.0), jnp.float32(options.top_p), jnp.asarray(self._stops)
    )
    run = programs.programs(
      self.decoder.model, self.decoder.dtype, self._mesh, options.kind(), self._num_words
    )
    made: list[list[int]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].prompt))
    for at in range(0, len(order), batch_size):
      numbers = order[at : at + batch_size]
      running = np.ones(len(numbers), bool)
      state, pieces = self._start([rows[number] for number in numbers], max_new_tokens, seed)
      for new_BN in _calls(run, self.params, state, pieces, max_new_tokens, every, knobs, running):
        stopped_BN = np.isin(new_BN[: len(numbers)], self._stops)
        for row, number in enumerate(numbers):
          if running[row]:
            tokens = new_BN[row, : _first(stopped_BN[row])].tolist()
            made[number] += tokens
            running[row] = not stopped_BN[row].any() and not (tokens and watch(number, tokens))
    return made

  def _start(self, rows: Sequence[Row], max_new_tokens: int, seed: int):
    """The empty state of a batch, and its prompts in pieces BT."""
    shards = self.decoder.layout.row_shards
    batch = shards * 2 ** math.ceil(math.log2(-(-len(rows) // shards)))
    length, piece, slots = shape(max(len(row.prompt) for row in rows), max_new_tokens)
    self._check_room(batch, slots)
    tokens_BT = np.zeros((batch, length), np.int32)
    first_B = np.full(batch, length, np.int32)
    noise_B2 = np.zeros((batch, 2), np.uint32)
    for number, row in enumerate(rows):
      first_B[number] = length - len(row.prompt)
      tokens_BT[number, first_B[number] :] = row.prompt
      noise_B2[number] = _noise(seed, row)
    state = programs.start(self.decoder, slots, first_B, noise_B2)
    return state, np.split(tokens_BT, length // piece, axis=1)

  def _check_room(self, batch: int, slots: int) -> None:
    layout, model = self.decoder.layout, self.decoder.model
    of_token = arithmetic.cache_bytes(model, self.decoder.dtype)
    experts = model.attention_experts
    cut = layout.sizes['tensor'] * layout.row_shards
    if experts and not experts.shared_kv:
      cut *= layout.sizes['expert']
    # Every fake device of a CPU has its part in the one memory.
    here = cut if layout.platform == 'cpu' else 1
    needed, free = batch * slots * of_token * here // cut, memory.free_bytes()
    if free is not None and needed > free:
      raise UserError(
        f'Keys and values of {batch} x {slots:,} tokens take {needed / 1e9:,.1f} GB, and '
        f'{free / 1e9:,.1f} GB are free: lower --batch_size or --max_new_tokens, or shorten the '
        'prompt.'
      )


def _calls(run, params, state, pieces, max_new_tokens, every, knobs, running) -> Iterator:
  """New tokens BN of each call of a program, the rows that are `running` when it is made."""
  for tokens_BT in pieces:
    state = run.read(params, state, tokens_BT, knobs)
  yield np.asarray(state.token_B)[:, None]
  left = max_new_tokens - 1
  while left and running.any():
    steps = min(every, left)
    finished_B = np.ones(len(state.token_B), bool)
    finished_B[: len(running)] = ~running
    state, written_BN = run.write(params, state, finished_B, jnp.int32(steps), knobs)
    yield np.asarray(written_BN)[:, :steps]
    left -= steps


def shape(longest: int, max_new_tokens: int) -> tuple[int, int, int]:
  """Tokens that prompts are padded to, those of a piece of them, and the cache's slots."""
  if longest <= PIECE:
    length = piece = bucket(longest)
  else:
    piece = PIECE
    length = -(-longest // piece) * piece
  return length, piece, bucket(length + max_new_tokens)


def bucket(tokens: int) -> int:
  """The next multiple of STEP, from 256 on of 32, 64, 128 and so on: at most a quarter larger."""
  step = max(STEP, 2 ** (math.ceil(math.log2(max(tokens, 1))) - 3))
  return -(-tokens // step) * step


def _first(stopped_N: np.ndarray) -> int:
  return int(np.argmax(stopped_N)) if stopped_N.any() else len(stopped_N)


def _noise(seed: int, row: Row) -> np.ndarray:
  """Two numbers for a row's draws, of seed, prompt and sample alone."""
  content = np.asarray([seed, row.sample, *row.prompt], np.int64).tobytes()
  return np.frombuffer(hashlib.sha256(content).digest()[:8], np.uint32)
