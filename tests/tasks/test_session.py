"""What is refused without lm-eval, and differences of checkpoints question by question."""

import math

import numpy as np
import pytest

from bam_jax.errors import UserError
from bam_jax.evaluate import comparison
from bam_jax.tasks import session
from tests.hf import folders


def test_mistakes_are_refused_before_lm_eval_is_imported(tmp_path, monkeypatch):
  monkeypatch.setattr(session.importlib.util, 'find_spec', lambda name: None)
  model = folders.make_model()
  path = str(folders.write_checkpoint(tmp_path / 'model', model, folders.draw(model)))
  for checkpoints, task, sentence in (
    ([path], 'arc_easy', 'requires lm-eval, which is not installed: pip install'),
    ([], 'x', '--checkpoint=DIR is required'), ([path] * 2, 'x', 'twice'),
    ([path + '/no'], 'x', '/no'),
  ):  # fmt: skip
    with pytest.raises(UserError, match=sentence):
      session.run(checkpoints, [task], comparison.Options('float32'))


def sample(number, wanted='none', **metrics):
  return {'doc_id': number, 'filter': wanted, **metrics}


def differences(ours, first, *metrics) -> dict:
  tasks = {'t': {'metrics': {name: {'value': 0.0, 'stderr': None} for name in metrics}}}
  session.add_differences(tasks, {'t': ours}, {'t': first})
  return tasks['t']['metrics']


def test_mean_and_error_of_the_differences():
  rng = np.random.default_rng(0)
  first, ours = rng.random(7), rng.random(7)
  found = differences(
    [sample(int(n), acc=ours[n]) for n in rng.permutation(7)],
    [sample(n, acc=first[n]) for n in range(7)],
    'acc',
  )['acc']
  assert found['difference'] == pytest.approx((ours - first).mean())
  error = np.std(ours - first, ddof=1) / math.sqrt(7)
  assert found['difference_stderr'] == pytest.approx(error)


def test_metrics_of_filters_are_kept_apart():
  pair = lambda strict, loose: [sample(0, 'strict', em=strict), sample(0, 'loose', em=loose)]
  found = differences(pair(1, 1), pair(0, 1), 'em,strict', 'em,loose')
  assert [found[name]['difference'] for name in found] == [1.0, 0.0]
  assert all(measure['difference_stderr'] is None for measure in found.values())  # one question
