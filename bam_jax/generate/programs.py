"""The two programs of generation, compiled once for each shape: read a piece of prompts, and write.

Legend: B batch, T tokens of a piece, N tokens that one call can write, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.generate import sampling
from bam_jax.model import cache as cache_lib
from bam_jax.model import decoder as decoder_lib
from bam_jax.model import resident

WRITES = 16  # N
NONE = -1  # in place of a token, of a row that is finished
STEPS = 'steps'  # the scope of the loop over tokens, in a compiled program's text


class State(NamedTuple):
  """All that a step reads and replaces; its buffers are donated."""

  cache: cache_lib.Cache
  first_B: jax.Array  # int32, slots of padding in front of each row
  filled: jax.Array  # int32, slots in use
  token_B: jax.Array  # int32, chosen and not read yet; NONE if finished
  noise_B2: jax.Array  # uint32, of each row's draws


class Knobs(NamedTuple):
  """What may change without compiling anew."""

  temperature: jax.Array
  top_p: jax.Array
  stops: jax.Array  # (n,) int32: tokens that finish a row, NONE for no token


class Programs(NamedTuple):
  """Jitted functions of global arrays."""

  # (params, state, tokens BT, knobs) -> state, whose token follows the piece
  read: Callable[[Any, State, jax.Array, Knobs], State]
  # (params, state, finished B, steps, knobs) -> state and the tokens BN that follow the one before;
  # the first `steps` columns count, at most WRITES
  write: Callable[[Any, State, jax.Array, jax.Array, Knobs], tuple[State, jax.Array]]


@functools.lru_cache(maxsize=8)
def programs(
  model: config.Model,
  dtype: str,
  mesh: jax.sharding.Mesh | None,
  kind: tuple[bool, int, bool],
  num_words: int | None = None,
  platform: str = '',
) -> Programs:
  """The programs of a model; they compile when they meet a new shape.

  Args:
    model: any variant.
    dtype: of weights, activations and cache.
    mesh: None is one device.
    kind: `Sampling.kind`.
    num_words: words that may be chosen, the first of them; None is all.
    platform: whose kernels; default: the mesh's.
  """
  decoder = decoder_lib.Decoder(model, dtype, mesh, platform)
  choose = sampling.chooser(kind)

  def advance(params, state, tokens_BT, first_B, knobs):
    logits_BV, cache = decoder.read(params, state.cache, tokens_BT, first_B, state.filled)
    if num_words is not None and num_words < logits_BV.shape[1]:
      logits_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < num_words, logits_BV, -jnp.inf)
    filled = state.filled + tokens_BT.shape[1]
    # Of a row's own length and no more: its draws do not depend on what it shares a batch with.
    keys_B = jax.vmap(_key)(state.noise_B2, filled - state.first_B)
    token_B = choose(logits_BV, keys_B, knobs.temperature, knobs.top_p)
    return state._replace(cache=cache, filled=filled, token_B=token_B)

  def read(params, state, tokens_BT, knobs):
    return advance(params, state, tokens_BT, state.first_B, knobs)

  def write(params, state, finished_B, steps, knobs):
    def step(number, carry):
      state, written_BN = carry
      over_B = (state.token_B == NONE) | (state.token_B[:, None] == knobs.stops).any(1)
      # The token of a finished row is padding, which visits no expert.
      first_B = jnp.where(over_B, state.filled + 1, state.first_B)
      new = advance(params, state, jnp.maximum(state.token_B, 0)[:, None], first_B, knobs)
      new = new._replace(token_B=jnp.where(over_B, NONE, new.token_B))
      column_B1 = new.token_B[:, None]
      return new, jax.lax.dynamic_update_slice_in_dim(written_BN, column_B1, number, axis=1)

    state = state._replace(token_B=jnp.where(finished_B, NONE, state.token_B))
    written_BN = jnp.full((state.token_B.shape[0], WRITES), NONE, jnp.int32)
    with jax.named_scope(STEPS):
      return jax.lax.fori_loop(0, steps, step, (state, written_BN))

  rows, layout = resident.ROWS, decoder.layout
  params_spec = resident.specs(decoder.abstract, layout)
  state_spec = State(cache_lib.specs(decoder.model, layout), rows, P(), rows, rows)
  read = layout.spread(read, (params_spec, state_spec, rows, P()), state_spec)
  write = layout.spread(write, (params_spec, state_spec, rows, P(), P()), (state_spec, rows))
  return Programs(jax.jit(read, donate_argnums=1), jax.jit(write, donate_argnums=1))


def start(
  decoder: decoder_lib.Decoder, slots: int, first_B: jax.Array, noise_B2: jax.Array
) -> State:
  """The state before anything is read.

  Args:
    decoder: whose cache.
    slots: room in it for each row's padding, prompt and new tokens.
    first_B: int32, padding in front of each row.
    noise_B2: uint32.
  """
  layout, batch = decoder.layout, len(first_B)
  cache = cache_lib.zeros(decoder.model, layout, batch, slots, decoder.dtype)
  put = lambda x, dtype, spec: jax.device_put(
    jnp.asarray(x, dtype), NamedSharding(layout.mesh, spec) if layout.mesh else None
  )
  rows = resident.ROWS
  return State(
    cache,
    put(first_B, jnp.int32, rows),
    put(0, jnp.int32, P()),
    put(jnp.full(batch, NONE), jnp.int32, rows),
    put(noise_B2, jnp.uint32, rows),
  )


def abstract_arguments(decoder: decoder_lib.Decoder, batch: int, slots: int) -> tuple:
  """Shapes and shardings of the arguments of `Programs.write`, to compile it for any devices."""
  layout = decoder.layout

  def array(shape, dtype, spec):
    sharded = NamedSharding(layout.mesh, spec) if layout.mesh else None
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharded)

  rows = resident.ROWS
  state = State(
    cache_lib.abstract(decoder.model, layout, batch, slots, decoder.dtype),
    array((batch,), jnp.int32, rows),
    array((), jnp.int32, P()),
    array((batch,), jnp.int32, rows),
    array((batch, 2), jnp.uint32, rows),
  )
  number = array((), jnp.float32, P())
  knobs = Knobs(number, number, array((1,), jnp.int32, P()))
  return (
    resident.abstract(decoder.abstract, layout, decoder.dtype),
    state,
    array((batch,), jnp.bool_, rows),
    array((), jnp.int32, P()),
    knobs,
  )


def _key(noise_2, number):
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(noise_2[0]), noise_2[1]), number)
