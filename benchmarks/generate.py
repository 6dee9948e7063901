"""Times generation with runs of a recipe, in alternation, on random tokens; paper section 7.3.

    python -m benchmarks.generate --config=benchmarks/shapes.py --json=-
    python -m benchmarks.generate --config=configs/small_590m.py --runs=btx,bam_shared_kv,bam_kv \
        --batch_sizes=1

Every round reads the prompts and generates the new tokens with each run, reads a large array (the
bandwidth) and multiplies two matrices (the peak), so that other load on the machine affects all of
them equally. Parameters are random. CPU seconds are those of this process: on a shared machine they
vary less than wall time.

The roofline is the larger of the times for the necessary reads and for the necessary FLOPs: every
weight that the tokens use, of routed experts those chosen by a token of the batch (with evenly
loaded routers), and the keys and values so far. The paper reports, relative to BTX and in total,
1.28 for KV experts and 1.24 for shared KV.

`--json` writes `device`, `prompt_tokens`, `new_tokens`, and `rows`, each for a `run`, a
`batch_size` and a `clock` ('wall' or 'cpu'), medians over rounds: `seconds` in total,
`read_seconds` for the prompt with the first token, `token_seconds` for each further one, each with
its `roofline_...`; paired ratios to the first run, `times_first`, and those of the rooflines.
`bandwidth` and `peak`, in bytes and FLOPs per second, have a number for each clock.
"""

import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from bam_jax import cli, config
from bam_jax.errors import UserError
from bam_jax.generate import generator
from bam_jax.model import arithmetic, transformer
from bam_jax.parallel import sharding
from bam_jax.recipes import graph

_CONFIG = cli.define_recipe()
_RUNS = flags.DEFINE_list('runs', ['btx'], 'Names of the runs; ratios are relative to the first.')
_BATCHES = flags.DEFINE_list('batch_sizes', ['1', '8'], 'Numbers of rows at once.')
_PROMPT = flags.DEFINE_integer('prompt_tokens', 256, 'Prompt tokens of each row.', lower_bound=1)
_NEW = flags.DEFINE_integer('new_tokens', 16, 'New tokens of each row.', lower_bound=2)
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Measured rounds.', lower_bound=1)
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Dtype of all arrays.')

CLOCKS = 'wall', 'cpu'


def main() -> dict[str, Any]:
  """Times the runs and prints a table."""
  nodes = graph.resolve(cli.read_recipe(_CONFIG))
  for name in _RUNS.value:
    if name not in nodes:
      raise UserError(f'--runs={name} is not in the recipe, which has {", ".join(nodes)}.')
  models = {name: random_generator(nodes[name].model) for name in _RUNS.value}
  probes, samples = Probes(), {}
  for batch in map(int, _BATCHES.value):
    for number in range(_ROUNDS.value + 1):  # the first compiles
      for name, model in models.items():
        sample = run(model, batch)
        if number:
          samples.setdefault((name, batch), []).append(sample)
          probes.measure()
  speeds = probes.medians()
  rows = [
    row
    for (name, batch), taken in samples.items()
    for row in _rows(
      name, batch, nodes, np.array(taken), np.array(samples[_first(), batch]), speeds
    )
  ]
  _print(rows)
  device = jax.devices()[0]
  return {
    'device': f'{device.platform} {device.device_kind}',
    'prompt_tokens': _PROMPT.value,
    'new_tokens': _NEW.value,
    'rows': rows,
    **{name: dict(zip(CLOCKS, values)) for name, values in speeds.items()},
  }


class Probes:
  """The device's bandwidth and peak FLOP/s, by both clocks."""

  def __init__(self):
    array = jnp.ones(2**26, jnp.float32)  # more than any cache holds
    matrix = jnp.ones((1024, 1024), _DTYPE.value)
    self._work = {
      'bandwidth': (array.nbytes, jax.jit(jnp.sum), (array,)),
      'peak': (2 * 1024**3, jax.jit(jnp.matmul), (matrix, matrix)),
    }
    self._rates: dict[str, list] = {name: [] for name in self._work}
    self.measure()
    self._rates = {name: [] for name in self._work}  # that one compiled

  def measure(self) -> None:
    for name, (amount, function, arguments) in self._work.items():
      before = now()
      jax.block_until_ready(function(*arguments))
      self._rates[name].append(amount / (now() - before))

  def medians(self) -> dict[str, list[float]]:
    return {name: np.median(rates, axis=0).tolist() for name, rates in self._rates.items()}


def now() -> np.ndarray:
  """Seconds by both clocks."""
  return np.array([time.perf_counter(), time.process_time()])


def random_generator(model: config.Model) -> generator.Generator:
  """The model with random parameters, made an array at a time from one block of noise."""
  noise = np.random.default_rng(0).standard_normal(2**20 + 7, np.float32)
  leaves = jax.tree_util.tree_leaves_with_path(
    transformer.Network(model, config.Compute()).abstract()
  )
  shapes = {sharding.path_of(key_path): leaf for key_path, leaf in leaves}

  def read(path, index):
    shape = jax.eval_shape(lambda x: x[index], shapes[path]).shape
    start = zlib.crc32(f'{path}{index}'.encode()) % noise.size
    return np.resize(np.roll(noise, -start), shape) * np.float32(0.02)

  return generator.Generator(model, read, dtype=_DTYPE.value)


def run(model: generator.Generator, batch: int) -> np.ndarray:
  """Seconds to read the prompts with the first token, and for each further one; by both clocks."""
  rng = np.random.default_rng(1)
  words = model.decoder.model.vocab_size
  rows = [generator.Row(rng.integers(0, words, _PROMPT.value).tolist()) for _ in range(batch)]
  times = [now()]

  def watch(number, tokens):
    times.extend([now()] * (len(times) == 1))
    return False

  model.generate(rows, _NEW.value, batch_size=batch, watch=watch)
  return np.array([times[1] - times[0], (now() - times[1]) / (_NEW.value - 1)])


def needs(model: config.Model, batch: int, tokens: int, context: int) -> tuple[float, float]:
  """Bytes and FLOPs to read `tokens` of each row, after which there are `context`."""
  parts, itemsize = arithmetic.total_parts(model), jnp.dtype(_DTYPE.value).itemsize
  active = arithmetic.active_parts(model)

  def read(experts, total: int, active: int) -> float:
    """Numbers of a part of which each token meets k of N experts, and all the rest."""
    if not experts or not 0 < experts.top_k < experts.num_experts:
      return total
    N, k = experts.num_experts, experts.top_k
    of_one, missed = (total - active) / (N - k), N * (1 - k / N) ** (batch * tokens)
    return total - missed * of_one

  attention = read(model.attention_experts, parts.attention, active.attention)
  ffn = read(model.ffn_experts, parts.ffn, active.ffn)
  words = model.vocab_size * model.d_model  # of the output; of the input a few rows
  weights = words + parts.norms + attention + ffn + parts.routers
  cache = arithmetic.cache_bytes(model, _DTYPE.value) * batch * context
  seen = context if tokens > 1 else 2 * context  # the arithmetic takes half of it on average
  flops = arithmetic.forward_flops(model, seen) - 2 * words
  return itemsize * weights + cache, batch * (tokens * flops + 2 * words)


def _rows(name, batch, nodes, taken, first, speeds) -> list[dict[str, Any]]:
  """A row for each clock; samples are (round, read or token, clock)."""
  steps = np.array([1, _NEW.value - 1])
  rooflines = np.array([_roofline(nodes[n].model, batch, speeds) for n in (name, _first())])
  rows = []
  for clock, mine, base, (roof, base_roof) in zip(
    CLOCKS, taken.T.swapaxes(1, 2), first.T.swapaxes(1, 2), rooflines.transpose(2, 0, 1)
  ):
    facts = {'run': name, 'batch_size': batch, 'clock': clock}
    for key, weights in (('', steps), ('read_', [1, 0]), ('token_', [0, 1])):
      seconds, of_first = mine @ weights, base @ weights
      facts |= {
        f'{key}seconds': float(np.median(seconds)),
        f'{key}times_first': float(np.median(seconds / of_first)),
        f'roofline_{key}seconds': float(roof @ weights),
        f'roofline_{key}times_first': float(roof @ weights / (base_roof @ weights)),
      }
    rows.append(facts)
  return rows


def _roofline(model, batch, speeds) -> np.ndarray:
  """Minimum seconds to read the prompts and for a token, by both clocks."""
  middle = _PROMPT.value + _NEW.value // 2
  work = needs(model, batch, _PROMPT.value, _PROMPT.value), needs(model, batch, 1, middle)
  rates = np.array([speeds['bandwidth'], speeds['peak']])
  return np.array([np.max(np.array(each)[:, None] / rates, axis=0) for each in work])


def _first() -> str:
  return _RUNS.value[0]


def _print(rows: list[dict[str, Any]]) -> None:
  console, columns = cli.console(), ('batch', 'all', 'x', 'prompt', 'x', 'token', 'x')
  for clock in CLOCKS:
    title = f'ms, {clock} time; in brackets over the roofline; x: over {_first()} (its roofline)'
    body = []
    for row in (row for row in rows if row['clock'] == clock):
      cells = [row['run'], row['batch_size']]
      for key in ('', 'read_', 'token_'):
        seconds, roof = row[f'{key}seconds'], row[f'roofline_{key}seconds']
        cells.append(f'{1e3 * seconds:.1f} ({seconds / roof:.2f})')
        ratio, least = row[f'{key}times_first'], row[f'roofline_{key}times_first']
        cells.append(f'{ratio:.2f} ({least:.2f})')
      body.append(cells)
    console.print(cli.table(title, ['run'], columns, body))


if __name__ == '__main__':
  cli.run(main)
