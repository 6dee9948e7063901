"""The page of results: means and changes worked out by hand, and what is missing said so."""

import json
import math
import re
from pathlib import Path

import pytest

from bam_jax.errors import UserError
from tools.reproduction import draw, facts, pages

ROOT = Path(__file__).parent.parent.parent
DOMAINS = ('general', 'code', 'law', 'math')
LOAD = [[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]


def result(run, perplexities, kind='mixture', flops=1e6):
  """A result as training writes it, of 100 tokens and 400 bytes a domain."""
  statistics = {'load': LOAD, 'entropy': [0.5, 0.5], 'dropped': [0.0, 0.0]}
  return {
    'run': run,
    'label': pages.RUNS.get(run, {}).get('label', run),
    'kind': kind,
    'method': 'btx' if kind == 'mixture' else None,
    'sources': ['seed', 'code', 'law', 'math'],
    'step': 50,
    'tokens': 2_000_000,
    'wall_seconds': 61.23,
    'parameters': 1_234_567,
    'active_parameters': 1_000_000,
    'flops_per_token': flops,
    'domains': {
      domain: {
        'nll': 100 * math.log(value),
        'tokens': 100,
        'bytes': 400,
        'routing': {'ffn': statistics} if kind == 'mixture' else {},
      }
      for domain, value in zip(DOMAINS, perplexities)
    },
  }


def workdir(path, seed, results):
  """A workdir as training leaves it, its metrics with a step twice and half a line."""
  for r in results:
    folder = path / r['run']
    folder.mkdir(parents=True)
    (folder / 'result.json').write_text(json.dumps(r))
    identity = {'seed': seed, 'sources': {'seed': f'hash-{seed}'}, 'tokens': r['tokens']}
    (folder / 'config.json').write_text(json.dumps({'identity': identity}))
    lines = [{'step': 1, 'nll': 9.0}, {'step': 1, 'nll': 5.00004}]
    lines += [{'step': step, 'nll': 4.0, 'ffn': 'left out'} for step in range(2, 500)]
    lines += [{'step': 500, 'nll': 3.0}, {'step': 500, 'valid': dict.fromkeys(DOMAINS, 3.5)}]
    (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n{"step": 5')
  (path / 'unfinished').mkdir()
  (path / 'recipe.json').write_text(
    json.dumps({'command': f'python … --seed={seed}', 'devices': '1 x', 'versions': {'jax': '1.2'}})
  )
  return path


# BAM against BTX: seed 0 has 9/10, 18/20, 4/5 and 13/10 of the domains' perplexities, and of the
# average 44/45; seed 1 has 1, 1, 1, 1.
RESULTS = {
  0: [
    result('seed', (12, 30, 8, 20), 'seed'),
    result('code', (15, 15, 9, 25), 'specialist'),
    result('btx', (10, 20, 5, 10)),
    result('bam_kv', (9, 18, 4, 13), flops=1.5e6),
    result('btx_0_001', (8, 8, 8, 8)),
    result('bam_kv_0_004', (6, 6, 6, 6)),
  ],
  1: [result('btx', (20, 20, 20, 20)), result('bam_kv', (20, 20, 20, 20), flops=1.5e6)],
}


@pytest.fixture
def seeds(tmp_path):
  for seed, results in RESULTS.items():
    collected = facts.collect(seed, workdir(tmp_path / f'r_{seed}', seed, results))
    facts.write(tmp_path / 'results' / f'seed_{seed}.json', collected)
  return facts.read(tmp_path / 'results')


def cells(section, head):
  """The cells of the line of a table that begins with some cell."""
  [line] = [line for line in section.splitlines() if line.startswith(f'| {head} |')]
  return [cell.strip() for cell in line.split('|')[2:-1]]


def lines_below(section, head):
  lines = section.splitlines()
  [at] = [i for i, line in enumerate(lines) if line.startswith(f'| {head} |')]
  return [cell.strip() for cell in lines[at + 1].split('|')[2:-1]]


def test_means_and_changes(seeds):
  kv = 'BAM, KV experts'
  assert cells(pages.perplexity(seeds), kv) == [
    '2', '14.50 (9.00 to 20.00)', '19.00 (18.00 to 20.00)', '12.00 (4.00 to 20.00)',
    '16.50 (13.00 to 20.00)', '15.50 (11.00 to 20.00)',
  ]  # fmt: skip
  against = pages.against_btx(seeds)
  # (44/45 - 1) / 2 = -1.1%: the mean of the changes, and not the change of the means, -0.8%
  assert cells(against, kv) == [
    '2', '−5.0% (−10.0% to +0.0%)', '−5.0% (−10.0% to +0.0%)', '−10.0% (−20.0% to +0.0%)',
    '+15.0% (+0.0% to +30.0%)', '−1.1% (−2.2% to +0.0%)',
  ]  # fmt: skip
  assert cells(pages.vocabulary(seeds), kv) == cells(against, kv)
  # 24.02 / 26.72, 3.45 / 3.78, 6.04 / 6.63, 5.31 / 5.77, and 9.705 / 10.725
  assert lines_below(against, kv) == ['', '*−10.1%*', '*−8.7%*', '*−8.9%*', '*−8.0%*', '*−9.5%*']
  assert cells(against, 'BAM, shared KV') == ['0', *['missing'] * 5]


def test_the_pages_of_this_project_are_what_its_files_draw():
  """Nobody wrote a number by hand, and nobody forgot to draw; pictures by their names."""
  names, folder = draw.PAGES, ROOT / 'docs' / 'results'
  texts = {ROOT / name: (ROOT / name).read_text() for name in names}
  before, seeds = dict(texts), facts.read(folder)
  for name, section in (pages.SECTIONS | {'summary': pages.summary}).items():
    pages.replace(texts, name, section(seeds))
  for apart, sections in pages.APART.items():
    others = facts.read(folder / apart)
    for name, section in sections.items():
      pages.replace(texts, name, section(others))
  assert texts == before
  shown = re.findall(r'\]\(results/(\w+\.png)\)', '\n'.join(texts.values()))
  assert sorted(shown) == sorted(file.name for file in folder.glob('*.png'))


def test_equal_compute(seeds):
  for seed, (btx, other, bam) in zip(seeds, [(40, 20, 15), (10, 20, 11)]):
    for run, value in (('btx_random_1', btx), ('btx_prefix_1', other), ('bam_top1_prefix_1', bam)):
      seed['runs'][run] = result(run, [value] * 4)
  row = 'BAM, shared KV, top-1, prefix, centroids'
  missing = pages.MISSING
  assert cells(pages.equal_compute_against(seeds), row) == [
    missing, missing, '−7.5% (−25.0% to +10.0%)', missing,
  ]  # fmt: skip
  assert cells(pages.equal_compute(seeds), row)[3] == '13.00 (11.00 to 15.00)'


def test_what_cannot_be_compared_or_read_is_one_sentence(seeds, tmp_path):
  with pytest.raises(UserError, match=r'--workdir=1=.*its run \w+ is of seed 0'):
    facts.collect(1, tmp_path / 'r_0')
  with pytest.raises(UserError, match='has no finished run'):
    facts.collect(0, tmp_path / 'nowhere')
  seeds[1]['runs']['btx']['configuration']['tokens'] = 5
  facts.write(tmp_path / 'results' / 'seed_1.json', seeds[1])
  with pytest.raises(UserError, match='runs btx of seeds 0 and 1 differ in tokens'):
    facts.read(tmp_path / 'results')
  (tmp_path / 'r_0' / 'btx' / 'result.json').write_text('{')
  with pytest.raises(UserError, match='btx/result.json is not JSON'):
    facts.collect(0, tmp_path / 'r_0')
