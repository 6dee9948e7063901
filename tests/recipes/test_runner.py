"""What a recipe's runs record of where they came from; `main` as a process is in test_main."""

import json
import os
import shutil
import signal

import pytest

from bam_jax import checkpoint, config
from bam_jax.data import mixture
from bam_jax.prepare import recipe_data
from bam_jax.recipes import runner
from bam_jax.reports import report
from bam_jax.train import stop
from bam_jax.upcycle import rules


def test_checkpoints_say_what_they_were_made_from(tmp_path, dataset, recipe_dict, capsys):
  runs = recipe_dict['runs']
  recipe_dict['runs'] = {name: runs[name] for name in ('seed', 'code', 'btx')}
  changes = {'from': ['seed', 'code'], 'num_experts': 3, 'renormalize': True}
  runs['btx']['init']['upcycle'] |= changes
  for run in runs.values():
    run |= {'tokens': 0, 'schedule': run['schedule'] | {'warmup_steps': 0}}
  runs['code']['tokens'] = 8 * 16  # one step: equal sources are refused
  recipe_dict |= {'seed': 7, 'evaluation': {'batch_size': 8, 'domains': ['law']}}
  parsed = config.parse(recipe_dict)
  runner.execute(parsed, tmp_path, dataset)

  metas = {name: checkpoint.read_meta(tmp_path / name) for name in recipe_dict['runs']}
  assert checkpoint.find_tokenizer(tmp_path / 'code') == tmp_path / 'code' / 'tokenizer.json'
  assert metas['seed'].manifest is None
  origin = metas['code'].manifest
  assert [(source.run, source.step, source.path) for source in origin.sources] == [
    ('seed', 0, str(tmp_path / 'seed'))
  ]
  assert origin.upcycle is None and origin.made == ()
  made = metas['btx'].manifest
  assert [source.run for source in made.sources] == ['seed', 'code']
  assert made.upcycle == parsed.runs['btx'].init.upcycle
  assert (made.seed, made.name) == (7, 'btx') and made.made == rules.rules(metas['btx'].model)
  assert metas['btx'].sources == ('seed', 'code', 'seed')
  assert 'btx: The routers of FFN choose one expert' in capsys.readouterr().err

  # Runs without a step are runs like others: reported, drawn, and finished.
  facts = report.write(tmp_path, [*recipe_dict['runs']])
  assert [row['run'] for row in facts['rows']] == ['seed', 'code', 'btx']
  assert all(row['perplexity']['law'] > 1 for row in facts['rows'])
  runner.execute(parsed, tmp_path, dataset)
  assert capsys.readouterr().err.count('already finished') == 3


@pytest.fixture
def execute(tmp_path, dataset, recipe_dict):
  """Trains a seed of no steps in the folder of a name, and evaluates it on one domain."""
  recipe_dict['runs'] = {'seed': recipe_dict['runs']['seed']}
  recipe_dict['runs']['seed'] |= {'tokens': 0}
  recipe_dict['runs']['seed']['schedule'] |= {'warmup_steps': 0}
  recipe_dict |= {'evaluation': {'batch_size': 1, 'domains': ['law']}}
  return lambda name: runner.execute(config.parse(recipe_dict), tmp_path / name, dataset)


def test_the_last_evaluation_may_be_stopped(tmp_path, execute, monkeypatch):
  """All held-out text may take long; the state is saved before it, and a resume does it anew."""
  domains = lambda name: json.loads((tmp_path / name / 'seed/result.json').read_text())['domains']
  execute('undisturbed')

  heldout, evaluated = mixture.heldout, []

  def stopped_at_the_second(*arguments, **keywords):
    for number, batch in enumerate(heldout(*arguments, **keywords)):
      if number == 1:
        os.kill(os.getpid(), signal.SIGTERM)
      evaluated.append(number)
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(mixture, 'heldout', stopped_at_the_second)
    with pytest.raises(stop.Stopped, match='SIGTERM'):
      execute('stopped')
  assert evaluated == [0, 1]
  assert checkpoint.finished_step(tmp_path / 'stopped/seed/checkpoints') == 0
  execute('stopped')
  assert domains('stopped') == domains('undisturbed')


def test_a_dataset_is_prepared_once(tmp_path, text):
  mine = tmp_path / 'mine'
  shutil.copytree(text, mine)
  data = config.Data(str(tmp_path / 'data'), 16, config.Prepare(str(mine), train_tokenizer=300))
  manifest = recipe_data.open_dataset(data).manifest
  shutil.rmtree(mine)  # the dataset alone is enough
  assert recipe_data.open_dataset(data).manifest == manifest
