"""What is kept of a seed's runs: `docs/results/seed_<n>.json`, a line a run.

seed, devices, versions    what trained them last; null and empty where it is not known
runs.<name>                of each finished run:
  label, kind, method, experts, parameters, active_parameters, flops_per_token, step, tokens,
  wall_seconds
  domains.<domain>         the held-out nll (nats), tokens and bytes, summed
  routing.<router>.<domain>   the load of each expert [L][E]: L layers, E experts
  configuration            what its parameters follow from, but for the random seed
  nll, valid               [step, training nats per token] and [step, {domain: the same, held-out}]
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_jax.errors import UserError

FOLDER = 'docs/results'

Run = dict[str, Any]

COPIED = (
  'label', 'kind', 'method', 'parameters', 'active_parameters', 'flops_per_token', 'step', 'tokens',
)  # fmt: skip
FROM_SEED = ('seed', 'sources')  # the sources' hashes have the seed in them
CURVE_POINTS = 200


def collect(seed: int, workdir: Path) -> dict[str, Any]:
  """The facts of the finished runs in a workdir, whatever recipe they are of.

  Raises:
    UserError: the workdir has no finished run, is of another seed, or a file is damaged.
  """
  runs = {}
  for result in sorted(workdir.glob('*/result.json')):
    config = _read(result.with_name('config.json'))['identity']
    if config['seed'] != seed:
      raise UserError(
        f'--workdir={seed}={workdir}: its run {result.parent.name} is of seed {config["seed"]}:'
        f' write --workdir={config["seed"]}={workdir}.'
      )
    runs[result.parent.name] = _run(_read(result), config, _metrics(result.parent))
  if not runs:
    raise UserError(f'--workdir={seed}={workdir} has no finished run: train one, or fix the path.')
  about = workdir / 'recipe.json'  # comes with the report, when all is trained
  recipe = _read(about) if about.exists() else {}
  return {
    'seed': seed,
    'devices': recipe.get('devices'),
    'versions': recipe.get('versions', {}),
    'runs': runs,
  }


def write(path: Path, facts: Mapping[str, Any]) -> None:
  """Writes facts with sorted keys and a line a run, so that a changed run is a changed line."""
  dump = lambda value: json.dumps(value, sort_keys=True, ensure_ascii=False)
  runs = ',\n'.join(f'  {dump(name)}: {dump(run)}' for name, run in sorted(facts['runs'].items()))
  others = [f' {dump(key)}: {dump(facts[key])}' for key in sorted(facts) if key != 'runs']
  lines = ',\n'.join([*others, f' "runs": {{\n{runs}\n }}'])
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'{{\n{lines}\n}}\n', encoding='utf-8')


def read(folder: Path) -> list[dict[str, Any]]:
  """The facts of all seeds in a folder, in the order of the seeds.

  Raises:
    UserError: two seeds have a run of one name by different configurations, whose mean would mean
      nothing; or a file is damaged.
  """
  seeds = sorted((_read(path) for path in folder.glob('seed_*.json')), key=lambda f: f['seed'])
  first = {}
  for facts in seeds:
    for name, run in facts['runs'].items():
      seed, configuration = first.setdefault(name, (facts['seed'], run['configuration']))
      differs = [k for k in configuration if run['configuration'].get(k) != configuration[k]]
      if differs:
        raise UserError(
          f'{folder}: the runs {name} of seeds {seed} and {facts["seed"]} differ in'
          f' {", ".join(differs)}: collect runs of one recipe.'
        )
  return seeds


def _run(result: Mapping[str, Any], config: Mapping[str, Any], metrics: Sequence[dict]) -> Run:
  routing = {}
  for domain, scores in result['domains'].items():
    for router, statistics in scores['routing'].items():
      load = [[round(share, 4) for share in layer] for layer in statistics['load']]
      routing.setdefault(router, {})[domain] = load
  nll = [[line['step'], round(line['nll'], 4)] for line in metrics if 'nll' in line]
  valid = [[line['step'], line['valid']] for line in metrics if 'valid' in line]
  return {
    **{key: result[key] for key in COPIED},
    'experts': result['sources'] if routing else [],
    'wall_seconds': round(result['wall_seconds'], 1),
    'domains': {
      domain: {key: scores[key] for key in ('nll', 'tokens', 'bytes')}
      for domain, scores in result['domains'].items()
    },
    'routing': routing,
    'configuration': {key: value for key, value in config.items() if key not in FROM_SEED},
    'nll': _thin(nll),
    'valid': [[step, {d: round(v, 4) for d, v in by.items()}] for step, by in _thin(valid)],
  }


def _thin(points: Sequence[Any]) -> list[Any]:
  """Every so manyth point, and the last."""
  stride = max(1, math.ceil(len(points) / CURVE_POINTS))
  return [*points[:-1:stride], *points[-1:]]


def _metrics(folder: Path) -> list[dict[str, Any]]:
  """One line a step, in order: a resumed run writes some steps again, and the last word counts."""
  lines = {}
  for text in (folder / 'metrics.jsonl').read_text(encoding='utf-8').splitlines():
    try:
      line = json.loads(text)
    except ValueError:
      continue  # a run that is killed may leave half a line; it then writes that step again
    lines[line['step']] = lines.get(line['step'], {}) | line
  return [lines[step] for step in sorted(lines)]


def _read(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}.') from error
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error}): make it again.') from error
