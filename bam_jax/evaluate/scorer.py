"""Likelihoods of tokens under a checkpoint, the same to the last bit whatever the mesh and batch.

Documents are cut into windows that a model can read, and windows padded to batches of few shapes.
Each is a row of its own, computed whole on one device: its scores depend on its own tokens and its
group alone. A group is what a device computes at once, and does not depend on the number of
devices. A mesh's `data` axis repeats the weights; whatever else it has cuts them, to be gathered a
layer at a time: all are `fsdp` here.

Legend: B rows, T tokens that are read, S = T + 1, D model, V vocabulary, L layers, E experts.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from bam_jax import config
from bam_jax.model import parameters, transformer
from bam_jax.parallel import sharding
from bam_jax.upcycle import outputs
from bam_jax.upcycle.sources import Source, open_checkpoint

Array = jax.Array | np.ndarray
MAX_LOGITS = 2**25  # float32, of a device at once
MIN_LENGTH = 32  # tokens that the shortest windows are padded to
# Tokens of a group, if a window is not longer alone: what keeps an accelerator busy. On a CPU a
# window is a group, and its scores are the same whatever else is scored.
GROUP_TOKENS = 8192


class Window(NamedTuple):
  """Some consecutive tokens of a document."""

  tokens: np.ndarray  # one more than the model reads: the last one is scored and not read
  first: int  # the first that is scored, at least 1; the model conditions on those before


class Batch(NamedTuple):
  """Groups of one shape, one for each device, of which the last ones may be missing windows."""

  numbers: tuple[int, ...]  # of the windows, in the order of the rows
  tokens_BS: np.ndarray  # int32
  length_B: np.ndarray  # int32, tokens that the model reads of each row


class Routed(NamedTuple):
  """What one router did with tokens from which others were predicted; of a batch both are LBTE."""

  gate_LTE: Array  # of all the experts, before the top-k
  load_LTE: Array  # share of the token that went to expert i


class Scored(NamedTuple):
  """Of a window's tokens that are scored; of a batch, of every one that follows one read, BT."""

  nll: Array  # negative log-likelihood, float32 nats
  greedy: Array  # whether each is the most probable token where it stands
  routing: dict[str, Routed]  # by router; of a window empty unless asked for


@functools.partial(jax.jit, static_argnames=('model', 'dtype', 'mesh'))
def score(
  params: transformer.Params,
  tokens_BS: jax.Array,
  length_B: jax.Array,
  *,
  model: config.Model,
  dtype: str,
  mesh: jax.sharding.Mesh,
) -> Scored:
  """The likelihood of every token (int32) but a row's first, under a dropless model.

  Of each row `length_B` (int32) tokens are read. The mesh is one of `rows_mesh`.
  """
  network = transformer.Network(model, config.Compute(dtype=dtype), mesh)
  layout = network.layout

  def run(params, tokens_BS, length_B):
    inputs_BT, targets_BT = tokens_BS[:, :-1], tokens_BS[:, 1:]
    position_T = jnp.arange(inputs_BT.shape[1])
    segments_BT = (position_T < length_B[:, None]).astype(jnp.int32)
    positions_BT = jnp.broadcast_to(position_T, inputs_BT.shape)
    hidden_BTD, routing = network.hidden(
      params, inputs_BT, segments_BT, positions_BT, collect='assignments'
    )
    routed = {k: Routed(x.gates_BTE, x.load_BTE) for k, x in routing._asdict().items() if x}
    tied = model.tied_embeddings
    name, leaf, axis = ('embed', 'table', 0) if tied else ('unembed', 'kernel', 1)
    kernel = layout.gather(params[name][leaf].astype(dtype), 'fsdp', dimension=axis)

    def one(pair):
      hidden_D, target = pair
      logits_V = network.logits({name: {leaf: kernel}}, hidden_D)
      return jax.nn.logsumexp(logits_V) - logits_V[target], logits_V.argmax() == target

    flat = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), targets_BT.reshape(-1)
    chunk = max(1, MAX_LOGITS // model.vocab_size)
    nll_N, greedy_N = jax.lax.map(one, flat, batch_size=chunk)
    return Scored(*(x_N.reshape(inputs_BT.shape) for x_N in (nll_N, greedy_N)), routed)

  rows, of_layers = sharding.BATCH, P(None, *sharding.BATCH)
  routers = {'attention': model.attention_experts, 'ffn': model.ffn_experts}
  routing = {name: Routed(of_layers, of_layers) for name, experts in routers.items() if experts}
  in_specs = sharding.specs(network.abstract()), rows, rows
  return layout.spread(run, in_specs, Scored(rows, rows, routing))(params, tokens_BS, length_B)


def rows_mesh(mesh: config.Mesh) -> config.Mesh:
  """The same devices with rows along all of them, and weights cut along all but `data`."""
  return config.Mesh(data=mesh.data, fsdp=mesh.fsdp * mesh.expert * mesh.tensor)


class Scorer:
  """A checkpoint on its devices, ready to score tokens; `length` is what it reads at once."""

  def __init__(
    self,
    path: str | Source,
    dtype: str = 'float32',
    mesh: config.Mesh = config.Mesh(),  # noqa: B008
    length: int | None = None,
  ):
    """Loads the checkpoint at or below `path`, or an opened model; UserError if it is damaged or
    does not fit.

    `length` is in tokens, by default what the model was trained at.
    """
    source = open_checkpoint(path) if isinstance(path, str) else path
    self.meta, self.tokenizer = source.meta, source.tokenizer()
    self.length = length or self.meta.sequence_length
    self._mesh = sharding.make_mesh(rows_mesh(mesh))
    self._params = _load(source, dtype, self._mesh)
    self._compute = dict(model=self.meta.model.dropless(), dtype=dtype, mesh=self._mesh)

  def loglikelihoods(
    self,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    progress: Callable[[int], None] = lambda done: None,
  ) -> list[tuple[float, bool]]:
    """Log-likelihood (natural) of each continuation, and whether greedy decoding would give it.

    Requests are tokens of context, cut from the left as needed, and of continuation, at least one
    of each. `progress` is called with how many more of their windows are done.
    """
    pieces, owners = [], []
    for number, (context, continuation) in enumerate(requests):
      if not len(context) or not len(continuation):
        raise ValueError(f'Request {number} has no context or no continuation.')
      tokens = np.asarray([*context, *continuation], np.int32)
      windows = list(cut(tokens, self.length, self.length, len(context)))
      pieces += windows
      owners += [number] * len(windows)
    totals, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    for number, scored in self.score(pieces):
      progress(1)
      totals[owners[number]] -= scored.nll.sum(dtype=np.float64)
      greedy[owners[number]] &= scored.greedy.all()
    return list(zip(totals.tolist(), greedy.tolist()))

  def score(self, windows: Sequence[Window], routing: bool = False) -> Iterator[tuple[int, Scored]]:
    """Scores windows of at most `length + 1` tokens; results come with their numbers, in any order.

    What the routers did is among them if `routing` asks for it.
    """
    before = None
    platform = self._mesh.devices.flat[0].platform
    for batch in batches(windows, self.length, platform, self._mesh.size):
      arrays = jax.device_put((batch.tokens_BS, batch.length_B), sharding.batch(self._mesh))
      scores = score(self._params, *arrays, **self._compute)
      if before:  # while the devices compute
        yield from _finish(windows, *before)
      before = batch, scores if routing else scores._replace(routing={})
    if before:
      yield from _finish(windows, *before)


def _finish(
  windows: Sequence[Window], batch: Batch, scores: Scored
) -> Iterator[tuple[int, Scored]]:
  scores = jax.device_get(scores)
  for row, number in enumerate(batch.numbers):
    window = windows[number]
    scored = slice(window.first - 1, len(window.tokens) - 1)
    routing = {k: Routed(*(x[:, row, scored] for x in pair)) for k, pair in scores.routing.items()}
    yield number, Scored(scores.nll[row, scored], scores.greedy[row, scored], routing)


def _load(source: Source, dtype: str, mesh: jax.sharding.Mesh):
  """Parameters on the mesh, matrices in the dtype in which they are used."""
  abstract = transformer.Network(source.meta.model, config.Compute()).abstract()
  sharding.check_divides(abstract, mesh.shape, f'{source.path}: --mesh', sharding.spec_of)

  def used(key_path, leaf):
    return jax.ShapeDtypeStruct(leaf.shape, parameters.dtype_of(key_path[-1].key, dtype))

  wanted = jax.tree_util.tree_map_with_path(used, abstract)
  source.check()
  return outputs.read_to_mesh(source.reader, wanted, sharding.tree(abstract, mesh))


def cut(tokens: np.ndarray, length: int, stride: int, first: int = 1) -> Iterator[Window]:
  """Windows that score every token from `first` on exactly once, in order.

  A document of at most `length + 1` tokens is one window. In a longer one each begins `stride`
  tokens, 1 to `length`, after the one before and scores what that did not reach. What stands before
  `first` is dropped, from the left, as far as the rest needs the room.
  """
  start, done = max(0, min(first - 1, len(tokens) - length - 1)), first
  while done < len(tokens):
    stop = min(start + length + 1, len(tokens))
    yield Window(tokens[start:stop], done - start)
    start, done = start + stride, stop


def batches(windows: Sequence[Window], length: int, platform: str, devices: int) -> Iterator[Batch]:
  """All windows with others of similar length, longest first; rows are padded to a power of two.

  A window has at most `length + 1` tokens; `devices` of `platform` compute a batch.
  """
  buckets: dict[int, list[int]] = {}
  for number, window in enumerate(windows):
    power = 1 << (len(window.tokens) - 2).bit_length()
    buckets.setdefault(min(max(MIN_LENGTH, power), length), []).append(number)
  for size in sorted(buckets, reverse=True):
    rows = devices * (1 if platform == 'cpu' else max(1, GROUP_TOKENS // size))
    for numbers in itertools.batched(buckets[size], rows):
      tokens_BS, length_B = np.zeros((rows, size + 1), np.int32), np.zeros(rows, np.int32)
      for row, number in enumerate(numbers):
        tokens = windows[number].tokens
        tokens_BS[row, : len(tokens)] = tokens
        length_B[row] = len(tokens) - 1
      yield Batch(numbers, tokens_BS, length_B)
