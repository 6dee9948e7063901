"""A checkpoint on its devices, ready to score tokens.

Legend: B rows, T tokens that are read, S = T + 1, L layers, E experts.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays
from bam_jax.errors import UserError
from bam_jax.evaluate import programs
from bam_jax.evaluate import windows as windows_lib
from bam_jax.model import block, parameters, transformer
from bam_jax.parallel import sharding


class Routed(NamedTuple):
  """What one router did with the tokens from which a window's scored ones were predicted."""

  gate_LTE: np.ndarray  # of all the experts, before the top-k
  load_LTE: np.ndarray  # share of the token that went to expert i


class Scored(NamedTuple):
  """Of the tokens of a window that are scored."""

  nll: np.ndarray  # negative log-likelihood, float32 nats
  greedy: np.ndarray  # whether each is the most probable token where it stands
  routing: dict[str, Routed]  # by router; empty unless asked for


class _Call(NamedTuple):
  """Groups that the program was given, one a device."""

  groups: list[windows_lib.Group]
  rows: int
  scores: programs.Scores


class Scorer:
  """Likelihoods of any tokens under one checkpoint.

  Attributes:
    meta: what the checkpoint is.
    tokenizer: its own.
    length: tokens that the model reads at once.
  """

  def __init__(
    self,
    path: str,
    dtype: str = 'float32',
    mesh: config.Mesh = config.Mesh(),  # noqa: B008
    batch_size: int = 16,
    length: int | None = None,
  ):
    """Loads the checkpoint at or below `path`, a part of an array at a time.

    Args:
      path: of a run, one of its steps, or what `convert` wrote.
      dtype: 'float32' or 'bfloat16', of activations and matrices.
      mesh: its devices; see `programs.rows_mesh`.
      batch_size: windows that are on the devices at once, or what they compute together if that is
        more.
      length: tokens of a window; default: what the model was trained at.

    Raises:
      UserError: it is no whole checkpoint, or does not fit the mesh.
    """
    self.meta = checkpoint.read_meta(path)
    self.tokenizer = checkpoint.open_tokenizer(path, self.meta)
    self.length = length or self.meta.sequence_length
    rows = programs.rows_mesh(mesh)
    self._mesh = sharding.make_mesh(rows)
    self._num_devices, self._batch_size = rows.size, batch_size
    self._params = _load(path, self.meta.model, dtype, rows, self._mesh)
    self._program = programs.score(programs.dropless(self.meta.model), dtype, self._mesh)
    self._platform = self._mesh.devices.flat[0].platform

  def loglikelihoods(
    self,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    progress: Callable[[int], None] = lambda done: None,
  ) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation of a context, and whether greedy decoding would give it.

    Args:
      requests: tokens of context and continuation, at least one of each. A context that leaves no
        room is cut from the left.
      progress: told how many more windows are done, of which a request has one, unless its
        continuation alone is longer.

    Returns:
      Natural logarithms, in the order of the requests.
    """
    pieces: list[windows_lib.Window] = []
    owners: list[int] = []
    for number, (context, continuation) in enumerate(requests):
      if not len(context) or not len(continuation):
        raise ValueError(f'Request {number} has no context or no continuation.')
      tokens = np.asarray([*context, *continuation], np.int32)
      cut = list(windows_lib.cut(tokens, self.length, self.length, len(context)))
      pieces += cut
      owners += [number] * len(cut)
    totals, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    for number, scored in self.score(pieces, progress=progress):
      totals[owners[number]] -= scored.nll.sum(dtype=np.float64)
      greedy[owners[number]] &= scored.greedy.all()
    return list(zip(totals.tolist(), greedy.tolist()))

  def score(
    self,
    windows: Sequence[windows_lib.Window],
    routing: bool = False,
    progress: Callable[[int], None] = lambda done: None,
  ) -> Iterator[tuple[int, Scored]]:
    """Scores windows; the results come with their windows' numbers, not in order.

    Args:
      windows: of at most `length + 1` tokens.
      routing: whether the results have what the routers did.
      progress: told how many more windows are done.
    """
    groups = windows_lib.groups(windows, self.length, self._platform)
    running: collections.deque[_Call] = collections.deque()
    for call in windows_lib.calls(groups, self._num_devices):
      rows = sum(group.rows for group in call)
      while running and rows + sum(other.rows for other in running) > self._batch_size:
        yield from self._finish(windows, running.popleft(), progress)
      running.append(_Call(call, rows, self._start(windows, call, routing)))
    while running:
      yield from self._finish(windows, running.popleft(), progress)

  def _start(self, windows, groups, routing: bool) -> programs.Scores:
    """Starts the program; its arrays are not there yet."""
    blank = groups[0]._replace(numbers=())
    filled = groups + [blank] * (self._num_devices - len(groups))
    parts = zip(*(windows_lib.pad(windows, group) for group in filled))
    place = sharding.batch(self._mesh)
    arguments = (jax.device_put(np.concatenate(part), place) for part in parts)
    scores = self._program(self._params, *arguments)
    return scores if routing else scores._replace(routing=block.Routing(None, None))

  def _finish(self, windows, call, progress) -> Iterator[tuple[int, Scored]]:
    """Waits for a call."""
    scores = jax.device_get(call.scores)
    routers = {k: v for k, v in scores.routing._asdict().items() if v is not None}
    for place, group in enumerate(call.groups):
      for row, number in enumerate(group.numbers, place * group.rows):
        window = windows[number]
        scored = slice(window.first - 1, len(window.tokens) - 1)
        routing = {
          name: Routed(choices.gate_BTE[:, row, scored], choices.load_BTE[:, row, scored])
          for name, choices in routers.items()
        }
        yield number, Scored(scores.nll_BT[row, scored], scores.greedy_BT[row, scored], routing)
      progress(len(group.numbers))


def _load(
  path: str, model: config.Model, dtype: str, sizes: config.Mesh, mesh: jax.sharding.Mesh
) -> transformer.Params:
  """Parameters on the mesh, matrices in the dtype in which they are used."""
  reader = checkpoint.open_params(path, model)
  wanted = transformer.Network(model, config.Compute()).abstract()
  try:
    sharding.check(wanted, sizes, '-')
  except UserError as error:
    raise UserError(str(error).replace('-.mesh', f'{path}: --mesh', 1)) from None

  def one(key_path, leaf, place):
    name = sharding.path_of(key_path)
    kept = key_path[-1].key in parameters.FLOAT32_NAMES
    return _place(reader, name, leaf.shape, np.dtype(np.float32 if kept else dtype), place)

  return jax.tree_util.tree_map_with_path(one, wanted, sharding.tree(wanted, mesh))


def _place(reader: arrays.Reader, name: str, shape, dtype, place) -> jax.Array:
  regions: dict[tuple, np.ndarray] = {}  # devices that have the same one read it once

  def read(index):
    key = tuple((part.start, part.stop) for part in index)
    if key not in regions:
      regions[key] = reader.read(name, index).astype(dtype)
    return regions[key]

  return jax.make_array_from_callback(shape, place, read)
