"""Times the train steps of runs of a recipe, in alternation, on random tokens.

    python -m benchmarks.train_step --config=benchmarks/shapes.py --runs=dense,btx --json=-
    python -m benchmarks.train_step --config=configs/small_590m.py --runs=seed,btx,bam_kv \
        --config.runs.seed.batch_size=16

Every round takes a few steps of each run, so that other load on the machine affects all of them
equally. CPU seconds are those of this process: on a shared machine they vary less than wall time.

`--json` writes `device`, and for each run `tokens_per_second`, `seconds` and `cpu_seconds` a step
(median, and the quartiles as `..._low` and `..._high`), `first_step_seconds` with compilation,
`flops` a step by the model, `flops_per_second`, and `times_first`: paired ratios to the first run.
"""

import resource
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from bam_jax import cli
from bam_jax.errors import UserError
from bam_jax.model import arithmetic, transformer
from bam_jax.parallel import sharding
from bam_jax.recipes import graph
from bam_jax.train import optimizer
from bam_jax.train import step as step_lib

_CONFIG = cli.define_recipe()
_RUNS = flags.DEFINE_list('runs', [], 'Names of the runs; default: all.')
_ROUNDS = flags.DEFINE_integer('rounds', 10, 'Measured rounds.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 2, 'Steps of each run in a round.', lower_bound=1)


def main() -> dict[str, Any]:
  """Times the runs and prints a table."""
  recipe = cli.read_recipe(_CONFIG)
  nodes = graph.resolve(recipe)
  names = _RUNS.value or list(nodes)
  for name in names:
    if name not in nodes:
      raise UserError(f'--runs={name} is not in the recipe, which has {", ".join(nodes)}.')
  steppers = {name: Stepper(recipe, nodes[name]) for name in names}
  for stepper in steppers.values():
    stepper.run(1)
  samples = {name: [] for name in names}
  for _ in range(_ROUNDS.value):
    for name, stepper in steppers.items():
      samples[name].append(stepper.run(_STEPS.value))
  facts = {name: _facts(steppers[name], samples[name], samples[names[0]]) for name in names}
  _print(facts)
  device = jax.devices()[0]
  return {'device': f'{device.platform} {device.device_kind}', 'runs': facts}


class Stepper:
  """One run's state, which its steps replace."""

  def __init__(self, recipe, node: graph.Node):
    run, length = node.run, recipe.data.sequence_length
    self.tokens = run.batch_size * length
    self.flops = self.tokens * arithmetic.training_flops(node.model, length)
    start = time.perf_counter()
    self.mesh = sharding.make_mesh(run.mesh)
    self.step = step_lib.train_step(
      node.model,
      run.compute,
      run.loss,
      run.optimizer,
      run.grad_accum_steps,
      self.mesh,
      optimizer.factors_of(run),
    )
    self.rates = np.full(2, 1e-4, np.float32)
    abstract = step_lib.abstract_state(node.model, run.compute, run.optimizer, self.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    network = transformer.Network(node.model, run.compute)
    with jax.set_mesh(self.mesh):
      params = jax.jit(network.init, out_shardings=shardings.params)(jax.random.key(0))
      adamw = optimizer.adamw(run.optimizer)
      opt_state = jax.jit(adamw.init, out_shardings=shardings.opt_state)(params)
    self.state = step_lib.State(params, opt_state)
    self.batch = sharding.put_batch(_batch(run.batch_size, length, node.model), self.mesh)
    self.run(1)
    self.first_step_seconds = time.perf_counter() - start

  def run(self, steps: int) -> tuple[float, float]:
    """Wall and CPU seconds a step."""
    start, cpu = time.perf_counter(), _cpu_seconds()
    with jax.set_mesh(self.mesh):
      for _ in range(steps):
        self.state, metrics = self.step(self.state, self.batch, self.rates)
      jax.block_until_ready(metrics)
    return (time.perf_counter() - start) / steps, (_cpu_seconds() - cpu) / steps


def _batch(rows: int, length: int, model) -> dict[str, np.ndarray]:
  words = np.random.default_rng(0).integers(0, model.vocab_size, (rows, length + 1), np.int32)
  return {
    'tokens': words[:, :-1],
    'targets': words[:, 1:],
    'segments': np.ones((rows, length), np.int32),
    'positions': np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    'weights': np.ones((rows, length), np.float32),
  }


def _cpu_seconds() -> float:
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


def _facts(stepper: Stepper, samples: list, first: list) -> dict[str, float]:
  facts = {'first_step_seconds': stepper.first_step_seconds, 'flops': stepper.flops}
  for column, key in enumerate(('seconds', 'cpu_seconds')):
    values = [sample[column] for sample in samples]
    low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
    facts |= {key: middle, f'{key}_low': low, f'{key}_high': high}
    ratios = [mine / theirs for mine, theirs in zip(values, (sample[column] for sample in first))]
    facts[f'{key}_times_first'] = float(np.median(ratios))
  facts['tokens_per_second'] = stepper.tokens / facts['seconds']
  facts['flops_per_second'] = stepper.flops / facts['seconds']
  return facts


def _print(facts: dict[str, dict[str, float]]) -> None:
  columns = ('tokens/s', 'ms a step', '(quartiles)', 'times first', 'CPU ms', '(quartiles)',
             'times first', 'GFLOP/s', 'first step s')  # fmt: skip
  rows = []
  for name, run in facts.items():
    cells = [name, f'{run["tokens_per_second"]:,.0f}']
    for key in ('seconds', 'cpu_seconds'):
      low, middle, high = (1e3 * run[f'{key}{suffix}'] for suffix in ('_low', '', '_high'))
      cells += [f'{middle:.1f}', f'{low:.1f}–{high:.1f}', f'{run[f"{key}_times_first"]:.3f}']
    flops, first = run['flops_per_second'] / 1e9, run['first_step_seconds']
    rows.append([*cells, f'{flops:.1f}', f'{first:.1f}'])
  console = cli.console()
  console.print(cli.table(None, ['run'], columns, rows))


if __name__ == '__main__':
  cli.run(main)
