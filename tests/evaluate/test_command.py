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
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.evaluate import bootstrap, comparison, corpus, session, windows
from bam_jax.evaluate.scorer import Scorer
from tests.evaluate.folders import LENGTH, write_checkpoint
from tests.model import oracle

ROOT = Path(__file__).parents[2]
MEASURES = 'nats_per_token', 'perplexity', 'bits_per_byte'


def params_of(model: config.Model, seed: int) -> dict:
  params = oracle.random_params(model, np.random.default_rng(seed))
  return oracle.map_leaves(lambda x: x.astype(np.float32), params)


@pytest.fixture(scope='module')
def runs(dataset, models, tmp_path_factory) -> dict[str, str]:
  """A dense run, a mixture, and a dense run with a tokenizer of its own."""
  folder = tmp_path_factory.mktemp('runs')
  own = {'other': Tokenizer.train(['the court shall act'] * 9, 270)}
  made = {}
  for key, (run, name) in enumerate(
    {'seed': 'dense', 'bam': 'bam_kv_experts', 'other': 'dense'}.items()
  ):
    params = params_of(models[name], key)
    experts = dict(method=name, sources=('general', 'code', 'law', 'math'))
    made[run] = str(
      write_checkpoint(
        folder / run,
        models[name],
        params,
        own.get(run, dataset.tokenizer()),
        **(experts if models[name].ffn_experts else {}),
      )  # fmt: skip
    )
  return made


def door(*flags: str, devices: int = 1) -> subprocess.CompletedProcess:
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices), 'PYTHONIOENCODING': 'utf-8',
    'COLUMNS': '140',
  }  # fmt: skip
  return subprocess.run(
    [sys.executable, '-m', 'bam_jax.evaluate', *flags],
    cwd=ROOT, env=environment, capture_output=True, text=True, encoding='utf-8',
  )  # fmt: skip


def test_two_checkpoints_on_any_mesh(runs, dataset, tmp_path, door_doc):
  flags = [f'--checkpoint={runs[name]}' for name in ('seed', 'bam')]
  flags += [f'--data={dataset.path}', '--stride=9', '--resamples=50', '--json=-']
  page = tmp_path / 'a/b'
  one = door(*flags, f'--routing={page}')
  assert one.returncode == 0, one.stderr
  facts = json.loads(one.stdout)  # and nothing else is there
  assert facts['routing_page'] == f'{page}/routing.html' and Path(facts['routing_page']).is_file()
  eight = door(*flags, '--mesh=data=2,fsdp=2,expert=2', '--batch_size=3', devices=8)
  assert eight.returncode == 0, eight.stderr
  again = json.loads(eight.stdout)
  assert again['mesh'] == {'data': 2, 'fsdp': 2, 'expert': 2, 'tensor': 1}
  for row in facts['rows']:
    row['routing'] = None
  assert again['rows'] == facts['rows']  # to the last bit
  for said in ('Perplexity', 'Bits per byte less those of seed', "Tokens with their domain's"):
    assert said in one.stderr
  words = set(re.findall(r'\w+', door_doc('evaluate')))
  assert facts.keys() <= words


def ask(runs, names, domains, **options):
  """The facts of `--json`, made in this process."""
  return session.run([runs[n] for n in names], domains, comparison.Options(**options), None)


@pytest.fixture(scope='module')
def texts() -> list[corpus.Domain]:
  rng = np.random.default_rng(0)
  words = 'the court shall act naïve 1 2 def x = of'.split()
  make = lambda count: [' '.join(rng.choice(words, rng.integers(1, 60))) for _ in range(count)]
  return [corpus.Text('law', make(7)), corpus.Text('code', make(4)), corpus.Text('one', make(1))]


def by_hand(path, domain, stride):
  """Nats and tokens of each document of a domain, one document at a time."""
  scorer = Scorer(path)
  sums = []
  for tokens in domain.documents(scorer.tokenizer):
    cut = list(windows.cut(tokens, LENGTH, stride))
    scored = [result.nll for _, result in scorer.score(cut)]
    assert sum(map(len, scored)) == len(tokens) - 1
    sums.append((sum(x.sum(dtype=np.float64) for x in scored), len(tokens) - 1))
  return np.array(sums)


def test_every_number(runs, texts, door_doc):
  options = dict(stride=11, resamples=40, confidence=0.8, seed=3)
  facts = ask(runs, ('seed', 'bam', 'other'), texts, **options)
  assert json.loads(json.dumps(facts)) == facts
  words = set(re.findall(r'\w+', door_doc('evaluate')))
  counts = {d.name: list(bootstrap.draws(len(d.byte_counts), 40, 3, d.name)) for d in texts}
  sums = {run: {d.name: by_hand(runs[run], d, 11) for d in texts} for run in runs}
  nbytes = {d.name: d.byte_counts for d in texts}

  def measures(nll, tokens, size):
    nats = nll / tokens
    return nats, math.exp(nats), nll / math.log(2) / size

  def of(run, names, weights):
    """The measures of some domains whose documents count as often as the weights say."""
    total = np.zeros(3)
    for name in names:
      for document, weight in enumerate(weights[name]):
        total += weight * np.array([*sums[run][name][document], nbytes[name][document]])
    return np.array(measures(*total))

  once = {name: np.ones(len(size)) for name, size in nbytes.items()}
  resamples = [{name: counts[name][r] for name in counts} for r in range(40)]
  for run, row in zip(('seed', 'bam', 'other'), facts['rows']):
    assert row.keys() <= words and row['label'] == run and row['window'] == LENGTH
    for name in (*nbytes, 'overall'):
      score = row['overall'] if name == 'overall' else row['domains'][name]
      assert score.keys() <= words
      names = list(nbytes) if name == 'overall' else [name]
      value, base = of(run, names, once), of('seed', names, once)
      drawn, drawn_base = (np.array([of(r, names, w) for w in resamples]) for r in (run, 'seed'))
      certain = name in ('one', 'overall')  # one document says nothing of other documents
      assert score['documents'] == sum(len(nbytes[n]) for n in names)
      assert score['bytes'] == sum(nbytes[n].sum() for n in names)
      assert score['tokens'] == sum(sums[run][n][:, 1].sum() for n in names)
      for i, measure in enumerate(MEASURES):
        check(score[measure], value[i], drawn[:, i], certain)
        if run == 'seed':
          assert score['difference'] is None
        elif run == 'other' and measure != 'bits_per_byte':
          assert score['difference'][measure] is None
        else:
          difference = drawn[:, i] - drawn_base[:, i]
          check(score['difference'][measure], value[i] - base[i], difference, certain)


def check(fact, value, drawn, certain):
  np.testing.assert_allclose(fact['value'], value, rtol=1e-9, atol=1e-12)
  if certain:
    assert fact['low'] is None and fact['high'] is None
  else:
    interval = np.quantile(drawn, [0.1, 0.9])
    np.testing.assert_allclose([fact['low'], fact['high']], interval, rtol=1e-9, atol=1e-12)


def test_a_document_scores_the_same_in_any_company(runs, texts):
  """Neither other documents nor other domains have a part in a domain's numbers."""
  (row,) = ask(runs, ['bam'], texts, resamples=20)['rows']
  (alone,) = ask(runs, ['bam'], texts[1:2], resamples=20)['rows']
  assert alone['domains']['code'] == row['domains']['code']


def test_notes(runs, texts, capsys):
  facts = ask(runs, ('seed', 'other'), texts, window=40, resamples=2)
  assert facts['rows'][0]['window'] == facts['rows'][0]['stride'] == 40
  assert [note.split()[0] for note in facts['notes']] == ['seed', 'other', 'The']
  assert 'was trained on sequences of 24 tokens and reads 40' in facts['notes'][0]
  printed = capsys.readouterr().err
  assert all(note in printed for note in facts['notes'])
  assert ask(runs, ('seed', 'bam'), texts, resamples=2)['notes'] == []


def test_a_table_marks_what_is_certain():
  measure = lambda low, high: {'bits_per_byte': {'value': 0.5, 'low': low, 'high': high}}
  say = lambda low, high: session.difference({'difference': measure(low, high)})
  assert say(0.1, 0.9) == '+0.5000*\n+0.1000 … +0.9000'
  assert say(-0.1, 0.9) == '+0.5000\n-0.1000 … +0.9000'
  assert say(None, None) == '+0.5000'


def test_names_of_equal_runs(runs, texts, tmp_path):
  shutil.copytree(runs['seed'], tmp_path / 'copy')
  paths = [runs['seed'], str(tmp_path / 'copy')]
  entries = comparison.enter(paths, texts, comparison.Options())
  assert [entry.label for entry in entries] == paths


MISTAKES = {
  'no checkpoint': ([], {}, '--checkpoint=DIR is required'),
  'not a checkpoint': (['/nowhere'], {}, '/nowhere holds no checkpoint'),
  'twice': (['{seed}', '{seed}/checkpoints/1'], {}, 'is given twice'),
  'stride': (['{seed}'], dict(window=8, stride=9), '--stride=9 is above the window of 8 tokens'),
  'too many devices': (['{seed}'], dict(mesh=config.Mesh(data=64)), 'shrink mesh'),
  'no router': (['{seed}'], dict(routing=True), '--routing shows routers, and no checkpoint has'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes(runs, texts, tmp_path, name):
  paths, options, sentence = MISTAKES[name]
  options = dict(options)
  folder = str(tmp_path) if options.pop('routing', False) else None
  with pytest.raises(UserError, match=re.escape(sentence)):
    session.run([p.format(**runs) for p in paths], texts, comparison.Options(**options), folder)


def test_a_tokenizer_that_prepared_something_else(runs, dataset):
  domains = corpus.read([str(dataset.path)], 'valid', 'text', 1)
  with pytest.raises(UserError, match='with another tokenizer than that of .*other'):
    comparison.enter([runs['seed'], runs['other']], domains, comparison.Options())


def test_parameters_that_are_no_numbers(runs, models, dataset, texts, tmp_path):
  params = params_of(models['dense'], 0)
  params['final_norm']['scale'] = np.full(32, np.nan, np.float32)
  path = write_checkpoint(tmp_path / 'lost', models['dense'], params, dataset.tokenizer())
  with pytest.raises(UserError, match='gives document 0 of law no finite likelihood'):
    ask({'lost': str(path)}, ['lost'], texts)


def test_a_checkpoint_that_lost_a_file(runs, texts, tmp_path):
  shutil.copytree(runs['bam'], tmp_path / 'run')
  largest = max((tmp_path / 'run').rglob('d/*'), key=lambda file: file.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  with pytest.raises(UserError, match='is damaged'):
    ask({'run': str(tmp_path / 'run')}, ['run'], texts)


def test_a_folder_that_cannot_be_made(runs, texts, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='--routing=.* cannot be written: Not a directory'):
    session.run([runs['bam']], texts, comparison.Options(), f'{tmp_path}/file/x')


def test_a_mistake_is_one_sentence_and_status_2(runs):
  done = door(f'--checkpoint={runs["seed"]}', '--data=/nowhere')
  assert done.returncode == 2 and done.stdout == ''
  assert 'write --data=DOMAIN=/nowhere' in done.stderr and done.stderr.count('\n') == 1
