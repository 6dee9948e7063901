"""The report against numbers worked out by hand, whatever the runs turned out to be."""

import io
import json
import math

import pytest
from rich.console import Console

from bam_jax.errors import UserError
from bam_jax.reports import report

KINDS = {'seed': 'seed', 'code': 'specialist'}


def result(run, general, code, method=None, sources=(), routers=(), own=0.75, flops=1e6):
  """A result with 100 tokens and 400 bytes a domain, given perplexities; None leaves a domain out.

  Of its two layers and experts `own` of each domain goes to the expert of its place.
  """
  loads = {'general': [own, 1 - own], 'code': [1 - own, own]}
  perplexities = {'general': general, 'code': code}
  return {
    'run': run, 'label': run.upper(), 'kind': KINDS.get(run, 'mixture'), 'method': method,
    'sources': list(sources), 'step': 50, 'tokens': 2_000_000, 'wall_seconds': 61.2,
    'parameters': 1_234_567, 'active_parameters': 1_000_000, 'flops_per_token': flops,
    'domains': {
      domain: {
        'nll': 100 * math.log(value), 'tokens': 100, 'bytes': 400,
        'routing': {
          name: {'load': [loads[domain]] * 2, 'entropy': [0.5, 0.5]} for name in routers
        },
      }
      for domain, value in perplexities.items() if value
    },
  }  # fmt: skip


SOURCES = ['seed', 'code']
RESULTS = [
  result('seed', 20.0, 10.0),
  result('code', 25.0, 4.0, sources=['seed']),
  result('bam', 19.0, 5.0, 'bam_kv_experts', SOURCES, ['attention', 'ffn'], flops=1.5e6),
  result('btx', 21.0, 4.0, 'btx', SOURCES, ['ffn']),
]


def save(workdir, results):
  for r in results:
    folder = workdir / r['run']
    folder.mkdir(parents=True)
    (folder / 'result.json').write_text(json.dumps(r))
  return [r['run'] for r in results]


def write(workdir, results):
  found = report.write(workdir, save(workdir, results))
  return found, (workdir / 'report' / 'report.md').read_text()


def cells(page, heading):
  """The table under a heading of the page: first cell -> the others."""
  section = page.split(f'## {heading}\n')[1].split('\n## ')[0]
  lines = [line for line in section.splitlines() if line.startswith('|')]
  rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
  return {row[0]: row[1:] for row in rows}


def test_tables_by_hand(tmp_path):
  found, page = write(tmp_path, RESULTS)
  assert cells(page, 'Perplexity') == {
    'run': ['general', 'code', 'average'],
    '---': ['---:', '---:', '---:'],
    'SEED': ['20.00', '10.00', '15.00'],
    'CODE': ['25.00', '**4.00**', '14.50'],
    'BAM': ['**19.00**', '5.00', '**12.00**'],
    'BTX': ['21.00', '**4.00**', '12.50'],
  }
  # A token is four bytes, so bits per byte are a quarter of the bits per token.
  assert cells(page, 'Bits per byte')['BTX'] == ['1.098', '**0.500**', '**0.799**']
  costs = ['1,234,567', '1,000,000', '50', '2,000,000', '3e+12', '1m 01s']
  assert cells(page, 'Cost')['BAM'] == costs
  seed, _, bam, btx = found['rows']
  assert btx['average_perplexity'] == pytest.approx(12.5) and btx['training_flops'] == 2e12
  assert btx['bits_per_byte']['code'] == pytest.approx(0.5)
  assert seed['routing'] == {} and seed['experts'] == []
  assert set(bam['routing']) == {'attention', 'ffn'} and set(btx['routing']) == {'ffn'}
  assert bam['experts'] == SOURCES
  # The files are what is returned.
  assert json.loads((tmp_path / 'report' / 'report.json').read_text()) == found
  assert found['recipe'] is None and found['name'] == tmp_path.name
  assert found['pictures'] == ['routing_bam.png', 'routing_btx.png']
  assert all(name in page for name in found['pictures'])
  # The same numbers give the same bytes.
  (tmp_path / 'again').mkdir()
  write(tmp_path / 'again', RESULTS)
  for name in found['pictures']:
    picture = (tmp_path / 'report' / name).read_bytes()
    assert picture.startswith(b'\x89PNG')
    assert (tmp_path / 'again' / 'report' / name).read_bytes() == picture


def test_runs_of_other_kinds(tmp_path):
  """Not finished; made of other experts than there are sources; without one domain."""
  odd = [RESULTS[0], RESULTS[2] | {'sources': ['seed']}]
  odd.append(result('btx', None, 4.0, 'btx', SOURCES, ['ffn']))
  runs = save(tmp_path, odd)
  found, console = report.write(tmp_path, [*runs, 'law']), Console(width=90, file=io.StringIO())
  console.print(report.table(found))
  assert found['not_finished'] == ['law']
  assert 'law: not finished' in console.file.getvalue()
  page = (tmp_path / 'report' / 'report.md').read_text()
  assert cells(page, 'Perplexity')['law: not finished'] == ['', '', '']
  assert found['rows'][1]['experts'] == ['0', '1']
  assert found['rows'][2]['average_perplexity'] is None
  assert cells(page, 'Perplexity')['BTX'] == ['–', '**4.00**', '–']


def test_a_run_that_diverged_is_in_a_report_that_json_can_hold(tmp_path):
  """No float holds exp(800); and a run without a likelihood has no score."""
  wild, mute = result('bam', 19.0, 5.0, 'btx'), result('mute', 19.0, 5.0)
  wild['domains']['code']['nll'] = 800 * 100
  mute['domains']['code']['nll'] = math.nan
  found, page = write(tmp_path, [*RESULTS[:2], wild, mute])
  text = (tmp_path / 'report' / 'report.json').read_text()
  assert json.dumps(json.loads(text), allow_nan=False) == json.dumps(found)
  table = cells(page, 'Perplexity')
  assert table['BAM'] == ['**19.00**', '>1e299', '>1e299']
  assert table['MUTE'] == ['**19.00**', '–', '–']


@pytest.mark.parametrize('wrong', [{'nll': '1'}, {'bytes': 0}, {'routing': {'ffn': {'load': 3}}}])
def test_a_result_of_something_else_is_damaged(tmp_path, wrong):
  save(tmp_path, RESULTS[:1])
  domain = {'nll': 1, 'tokens': 1, 'bytes': 1, 'routing': {}} | wrong
  result = RESULTS[0] | {'domains': {'general': domain}}
  (tmp_path / 'seed' / 'result.json').write_text(json.dumps(result))
  with pytest.raises(UserError, match='seed/result.json is damaged: delete its folder'):
    report.write(tmp_path, ['seed'])
  (tmp_path / 'seed' / 'result.json').write_text('{"run": ')
  with pytest.raises(UserError, match='seed/result.json is not JSON'):
    report.write(tmp_path, ['seed'])
