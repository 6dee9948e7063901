"""`WORKDIR/report/`: what the runs of a recipe reached and cost, as JSON, Markdown and pictures."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from rich.console import Group, RenderableType
from rich.markdown import Markdown
from rich.text import Text

from bam_jax.errors import UserError
from bam_jax.files import folders, json_file
from bam_jax.reports import figures, scores
from bam_jax.train.log import duration

Row = dict[str, Any]
COPIED = (
  'label', 'kind', 'method', 'sources', 'step', 'tokens', 'wall_seconds', 'parameters',
  'active_parameters', 'flops_per_token',
)  # fmt: skip


def write(workdir: Path | epath.Path, runs: Sequence[str]) -> dict[str, Any]:
  """Writes the report of the runs of a recipe, in order; returns what `report.json` holds.

  UserError when the result of a finished run cannot be read, or the report not written.

    name, recipe, domains, not_finished, pictures: `recipe` is `recipe.json`, or None.
    rows: of each finished run facts copied from its result, `training_flops`, `perplexity` (at most
      exp(690)) and `bits_per_byte` by domain, `average_perplexity` and `average_bits_per_byte`,
      `experts` (their names) and `routing` (router -> domain -> load [L][E]).
  """
  workdir = folders.at(workdir)
  while True:
    report = _write(workdir, runs)
    # Jobs that train other runs of the workdir write it too; the last of them must know of all.
    if not any((workdir / run / 'result.json').exists() for run in report['not_finished']):
      return report


def _write(workdir: Path | epath.Path, runs: Sequence[str]) -> dict[str, Any]:
  recipe = json_file.load_record(workdir / 'recipe.json')
  results = {run: json_file.load_record(workdir / run / 'result.json') for run in runs}
  finished = {run: result for run, result in results.items() if result is not None}
  domains = list(dict.fromkeys(d for result in finished.values() for d in result['domains']))
  rows = []
  for run, result in finished.items():
    try:
      rows.append({'run': run} | _row(result, domains))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
      path = workdir / run / 'result.json'
      raise UserError(f'{path} is damaged: delete its folder and train the run again.') from None
  report = {
    'name': recipe['name'] if recipe else workdir.resolve().name,
    'recipe': recipe,
    'domains': domains,
    'rows': rows,
    'not_finished': [run for run in runs if run not in finished],
  }
  folder = workdir / 'report'
  # Each file appears whole: jobs that train other runs of the workdir write the report too.
  with folders.writing(folder), folders.drafts(folder) as drafts:
    report['pictures'] = _draw(drafts, rows)
  folders.write_file(folder / 'report.json', json.dumps(report, indent=1) + '\n')
  folders.write_file(folder / 'report.md', markdown(report))
  return report


def table(report: Mapping[str, Any]) -> RenderableType:
  """The perplexities for a terminal, the best of each domain in bold."""
  title = Text(f'{report["name"]}: held-out perplexity', 'table.title')
  return Group(title, Markdown(_score_table(report, 'perplexity')))


def markdown(report: Mapping[str, Any]) -> str:
  """The report as a page of Markdown, given what `write` returns."""
  parts = [f'# {report["name"]}']
  if recipe := report['recipe']:
    parts.append(f'```\n{recipe["command"]}\n```')
    versions = [f'{name} {version}' for name, version in recipe.get('versions', {}).items()]
    devices = [recipe['devices']] if 'devices' in recipe else []
    parts.append(', '.join([f'Seed {recipe["seed"]}', *devices, *versions]) + '.')
  if not report['rows']:
    return '\n\n'.join([*parts, 'No run is finished.\n'])
  parts += [
    '## Perplexity',
    _score_table(report, 'perplexity'),
    'Held-out text; lower is better. Bold: the best of all runs. The average is the arithmetic mean'
    ' over the domains. Each row is one run from one random seed, so small differences may be'
    ' chance.',
    '## Bits per byte',
    _score_table(report, 'bits_per_byte'),
    'The same losses for each byte of text, which do not depend on the tokenizer.',
    '## Cost',
    _cost_table(report),
    'Each row is that run alone: a mixture also depends on the runs it was made from. Its losses by'
    ' step are in `tensorboard` and `metrics.jsonl` of its folder.',
  ]
  routed = [row for row in report['rows'] if row['routing']]
  if routed:
    parts.append('## Routing')
    parts += [f'![Routing of {row["label"]}](routing_{row["run"]}.png)' for row in routed]
  return '\n\n'.join(part.strip() for part in parts) + '\n'


def _row(result: Mapping[str, Any], domains: Sequence[str]) -> Row:
  # A domain without held-out text has no score, nor has one in which the model diverged.
  scored = {d: v for d, v in result['domains'].items() if v['tokens'] and math.isfinite(v['nll'])}
  perplexity = {d: scores.perplexity(v['nll'] / v['tokens']) for d, v in scored.items()}
  bits_per_byte = {d: v['nll'] / (math.log(2) * v['bytes']) for d, v in scored.items()}
  routing: dict[str, dict[str, Any]] = {}
  for domain, facts in scored.items():
    for router, statistics in facts['routing'].items():
      routing.setdefault(router, {})[domain] = statistics['load']
  experts = []
  for load in (load for by_domain in routing.values() for load in by_domain.values()):
    known = len(result['sources']) == len(load[0])
    experts = result['sources'] if known else [str(i) for i in range(len(load[0]))]
  return {
    **{key: result[key] for key in COPIED},
    'training_flops': result['flops_per_token'] * result['tokens'],
    'perplexity': perplexity,
    'average_perplexity': _average(perplexity, domains),
    'bits_per_byte': bits_per_byte,
    'average_bits_per_byte': _average(bits_per_byte, domains),
    'experts': experts,
    'routing': routing,
  }


def _average(values: Mapping[str, float], domains: Sequence[str]) -> float | None:
  """None where a domain is missing, as the mean of fewer domains compares with no other."""
  return sum(map(values.get, domains)) / len(domains) if len(values) == len(domains) else None


def _draw(folder: Path, rows: Sequence[Row]) -> list[str]:
  pictures = {f'routing_{row["run"]}.png': row for row in rows if row['routing']}
  for name, row in pictures.items():
    figures.routing(folder / name, row)
  return list(pictures)


def _score_table(report: Mapping[str, Any], score: str) -> str:
  rows, domains = report['rows'], report['domains']
  values = [[*map(row[score].get, domains), row[f'average_{score}']] for row in rows]
  known = [[value for value in column if value is not None] for column in zip(*values)]
  best = [min(column, default=None) for column in known]

  def cell(value: float | None, best: float | None) -> str:
    if value is None:
      return '–'
    text = scores.number(value) if score == 'perplexity' else f'{value:.3f}'
    return f'**{text}**' if value == best else text

  lines = [[_plain(row['label']), *map(cell, line, best)] for row, line in zip(rows, values)]
  lines += [[f'{run}: not finished', *[''] * (len(domains) + 1)] for run in report['not_finished']]
  return _markdown_table(['run', *domains, 'average'], lines)


def _cost_table(report: Mapping[str, Any]) -> str:
  header = ['run', 'parameters', 'active', 'steps', 'tokens', 'training FLOPs', 'wall time']
  counts = 'parameters', 'active_parameters', 'step', 'tokens'
  lines = []
  for row in report['rows']:
    cost = f'{row["training_flops"]:.3g}', duration(row['wall_seconds'])
    lines.append([_plain(row['label']), *(f'{row[key]:,}' for key in counts), *cost])
  return _markdown_table(header, lines)


def _plain(label: str) -> str:
  """What a user named, so that nothing in it is markup."""
  return re.sub(r'([\\`*_<\[])', r'\\\1', label)


def _markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  rule = ['---', *['---:'] * (len(header) - 1)]
  cell = lambda text: ' '.join(text.split()).replace('|', r'\|')
  return '\n'.join(f'| {" | ".join(map(cell, line))} |' for line in (header, rule, *lines))
