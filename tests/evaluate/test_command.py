"""`evaluate` as its users run it: whole processes, whole sentences, and every number looked at."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bam_jax import config
from bam_jax.convert import writing
from bam_jax.errors import UserError
from bam_jax.evaluate import comparison, corpus, session
from bam_jax.evaluate import scorer as scorer_lib
from bam_jax.prepare import training
from bam_jax.upcycle import growth
from bam_jax.upcycle.sources import open_checkpoint
from tests.evaluate.folders import LENGTH, write_checkpoint

ROOT = Path(__file__).parents[2]
MEASURES = 'nats_per_token', 'perplexity', 'bits_per_byte'


@pytest.fixture(scope='module')
def runs(models, saved, start, tmp_path_factory) -> dict[str, str]:
  """A dense run, a mixture, and a dense run with a tokenizer of its own."""
  own = training.train(['the court shall act'] * 9, 270)
  folder = tmp_path_factory.mktemp('runs') / 'other'
  other = write_checkpoint(folder, models['dense'], start('dense', seed=2), own)
  return {'dense': saved('dense'), 'bam': saved('bam_kv_experts'), 'other': str(other)}


def test_two_checkpoints_on_any_mesh(runs, dataset, server, tmp_path, command_doc):
  flags = [f'--checkpoint={runs[name]}' for name in ('dense', 'bam')]
  flags += [f'--data={dataset.path}', '--stride=9', '--resamples=50', '--json=-']
  folder = tmp_path / 'a/b'
  one = server.run('evaluate', *flags, f'--routing={folder}')
  assert one.status == 0, one.stderr
  facts = json.loads(one.stdout)  # and nothing else is there
  pictures = '1_attention.png', '1_ffn.png'  # of the second checkpoint
  assert sorted(file.name for file in folder.iterdir()) == sorted(pictures)
  flags += ['--mesh=data=2,fsdp=2,expert=2']
  line = [sys.executable, '-m', 'bam_jax.evaluate', *flags]
  devices = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '8'}
  eight = subprocess.run(line, cwd=ROOT, capture_output=True, env=devices)
  assert eight.returncode == 0, eight.stderr
  again = json.loads(eight.stdout)
  assert again['mesh'] == {'data': 2, 'fsdp': 2, 'expert': 2, 'tensor': 1}
  for row in facts['rows']:
    row['routing'] = None
  assert again['rows'] == facts['rows']  # to the last bit
  for said in ('Perplexity', 'Bits per byte minus those of dense', "Tokens with their domain's"):
    assert said in one.stderr
  assert facts.keys() <= set(re.findall(r'\w+', command_doc('evaluate')))


def ask(runs, names, domains, **options):
  """The facts of `--json`, made in this process."""
  return session.run([runs[n] for n in names], domains, comparison.Options(**options))


@pytest.fixture(scope='module')
def texts() -> list[corpus.Domain]:
  rng = np.random.default_rng(0)
  words = 'the court shall act naïve 1 2 def x = of'.split()
  make = lambda count: [' '.join(rng.choice(words, rng.integers(1, 60))) for _ in range(count)]
  return [corpus.Text('law', make(7)), corpus.Text('code', make(4)), corpus.Text('one', make(1))]


def by_hand(path, domain, stride):
  """Nats and tokens of each document of a domain, one document at a time."""
  scorer = scorer_lib.Scorer(path)
  sums = []
  for tokens in domain.documents(scorer.tokenizer):
    cut = list(scorer_lib.cut(tokens, LENGTH, stride))
    scored = [result.nll for _, result in scorer.score(cut)]
    assert sum(map(len, scored)) == len(tokens) - 1
    sums.append((sum(x.sum(dtype=np.float64) for x in scored), len(tokens) - 1))
  return np.array(sums)


def test_every_number(runs, texts, command_doc):
  facts = ask(runs, runs, texts, stride=11, resamples=40, confidence=0.8, seed=3)
  assert json.loads(json.dumps(facts)) == facts
  words = set(re.findall(r'\w+', command_doc('evaluate')))
  counts = {d.name: comparison.resampled(np.eye(len(d.byte_counts)), 40, 3, d.name) for d in texts}
  sums = {run: {d.name: by_hand(runs[run], d, 11) for d in texts} for run in runs}
  nbytes = {d.name: d.byte_counts for d in texts}

  def of(run, names, weights):
    """The measures of some domains whose documents count as often as the weights say."""
    nll, tokens, size = sum(
      weights[name] @ np.column_stack([sums[run][name], nbytes[name]]) for name in names
    )
    return np.array([nll / tokens, math.exp(nll / tokens), nll / math.log(2) / size])

  once = {name: np.ones(len(size)) for name, size in nbytes.items()}
  resamples = [{name: counts[name][r] for name in counts} for r in range(40)]
  for run, row in zip(runs, facts['rows']):
    assert row.keys() <= words and row['checkpoint'] == runs[run] and row['window'] == LENGTH
    for name in (*nbytes, 'overall'):
      score = row['overall'] if name == 'overall' else row['domains'][name]
      assert score.keys() <= words
      names = list(nbytes) if name == 'overall' else [name]
      value, base = of(run, names, once), of('dense', names, once)
      drawn, drawn_base = (np.array([of(r, names, w) for w in resamples]) for r in (run, 'dense'))
      certain = name in ('one', 'overall')  # one document says nothing of other documents
      assert score['documents'] == sum(len(nbytes[n]) for n in names)
      assert score['bytes'] == sum(nbytes[n].sum() for n in names)
      assert score['tokens'] == sum(sums[run][n][:, 1].sum() for n in names)
      for i, measure in enumerate(MEASURES):
        check(score[measure], value[i], drawn[:, i], certain)
        if run == 'dense':
          assert score['difference'] is None
        elif run == 'other' and measure != 'bits_per_byte':
          assert score['difference'][measure] is None
        else:
          difference = drawn[:, i] - drawn_base[:, i]
          check(score['difference'][measure], value[i] - base[i], difference, certain)


def test_notes_come_first_and_intervals_are_named_where_there_are_any(runs, texts, capsys):
  facts = ask(runs, ['dense', 'bam'], texts[2:], window=LENGTH + 1)
  said = capsys.readouterr().err
  assert said.startswith(facts['notes'][0]) and 'Scoring' in said and 'tokenizers' not in said
  assert 'Bits per byte minus' in said and 'interval' not in said
  assert any('interval' in table.title for table in session.tables(ask(runs, ['dense'], texts)))


def test_without_experts_it_scores_what_drop_expert_makes(runs, texts, tmp_path):
  dropped = str(tmp_path / 'dropped')
  source = growth.drop(open_checkpoint(runs['bam']), ['general', '2'])
  writing.copy_to_checkpoint(dropped, source, 0, '', lambda *_: None)
  mesh = config.Mesh(data=2, expert=2)
  facts = ask(runs, ['bam'], texts, without=['2', 'general'], mesh=mesh)
  [row], [want] = facts['rows'], ask({'dropped': dropped}, ['dropped'], texts)['rows']
  assert row['run'] == row['label'] == 'bam_kv_experts without 2 and general'
  assert row['experts'] == {'attention': ['code', 'math'], 'ffn': ['code', 'math']}
  assert (row['domains'], row['experts']) == (want['domains'], want['experts'])


def check(fact, value, drawn, certain):
  np.testing.assert_allclose(fact['value'], value, rtol=1e-9, atol=1e-12)
  if certain:
    assert fact['low'] is None and fact['high'] is None
  else:
    interval = np.quantile(drawn, [0.1, 0.9])
    np.testing.assert_allclose([fact['low'], fact['high']], interval, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('paths, options, folder, sentence', [
  ([], {}, None, '--checkpoint=DIR is required'),
  (['/nowhere'], {}, None, '/nowhere holds no checkpoint'),
  (['{dense}', '{dense}/checkpoints/1'], {}, None, 'is given twice'),
  (['{model}'], {}, None, 'run python -m bam_jax.convert import-hf --input='),
  (['{dense}'], dict(window=8, stride=9), None, '--stride=9 is above the window of 8 tokens'),
  (['{dense}'], dict(mesh=config.Mesh(data=64)), None, 'make mesh smaller'),
  (['{dense}'], dict(without=['law']), None, 'is a dense model, without experts'),
  (['{bam}'], dict(without=['x']), None, "no expert 'x'. Its experts are 0: general, 1: code"),
  (['{dense}'], {}, '.', '--routing requires a checkpoint with routers'),
  (['{bam}'], {}, f'{__file__}/x', 'cannot be written: Not a directory'),
])  # fmt: skip
def test_mistakes(runs, texts, tmp_path, paths, options, folder, sentence):
  (tmp_path / 'model.safetensors').touch()
  paths = [path.format(**runs, model=tmp_path) for path in paths]
  with pytest.raises(UserError, match=re.escape(sentence)):
    session.run(paths, texts, comparison.Options(**options), folder)


def test_checkpoints_that_cannot_score(runs, models, start, dataset, texts, tmp_path):
  domains = corpus.read([str(dataset.path)], 'valid', 'text', 1)
  with pytest.raises(UserError, match='with another tokenizer than that of .*other'):
    ask(runs, ['dense', 'other'], domains)
  params = start('dense') | {'final_norm': {'scale': np.full(32, np.nan, np.float32)}}
  lost = write_checkpoint(tmp_path / 'lost', models['dense'], params, dataset.tokenizer())
  with pytest.raises(UserError, match='has no finite likelihood for document 0 of law'):
    ask({'lost': str(lost)}, ['lost'], texts)
  shutil.copytree(runs['bam'], tmp_path / 'cut')
  largest = max((tmp_path / 'cut').rglob('d/*'), key=lambda file: file.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  with pytest.raises(UserError, match='is damaged'):
    ask({'cut': str(tmp_path / 'cut')}, ['cut'], texts)
