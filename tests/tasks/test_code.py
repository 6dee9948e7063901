"""Programs that solve a problem, and some that do not."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from bam_jax.errors import UserError
from bam_jax.tasks import code, session
from tests.hf import folders
from tests.tasks.test_sets import SHARED

DOC = {
  'prompt': 'def add(a, b):\n',
  'test': 'def check(candidate):\n  assert candidate(1, 2) == 3\n',
  'entry_point': 'add',
}
MBPP = {'test_setup_code': 'z = 1', 'test_list': ['assert f(z) == 2', 'assert f(2) == 3']}


@pytest.mark.parametrize('text, passed', [
  ('  return a + b', 1.0), ('  return a - b', 0.0), ('', 0.0), ('  raise SystemExit(0)', 0.0),
])  # fmt: skip
def test_human_eval(text, passed):
  assert code.human_eval(DOC, [text]) == {'pass_at_1': passed}


@pytest.mark.parametrize('text, passed', [
  ('def f(x):\r\n  return x + 1', 1.0),
  ('def f(x): return 2', 0.0),
  ('import os\nf = os._exit', 0.0),
])  # fmt: skip
def test_mbpp(text, passed):
  assert code.mbpp(MBPP, [text]) == {'pass_at_1': passed}
  assert code.mbpp({**MBPP, 'test_setup_code': None, 'test_list': []}, [text])['pass_at_1'] == 1.0


@pytest.mark.skipif(not SHARED.is_dir(), reason='the shared sets are not on this machine')
def test_solutions_of_the_authors():
  with gzip.open(SHARED / 'humaneval_problems.jsonl.gz', 'rt') as file:
    docs = [json.loads(line) for line in file]
  for doc in docs[::8]:
    assert code.human_eval(doc, [doc['canonical_solution']])['pass_at_1'] == 1.0, doc['task_id']
    assert code.human_eval(doc, ['  pass'])['pass_at_1'] == 0.0, doc['task_id']


def test_without_the_extra(tmp_path, monkeypatch):
  """One sentence that says how to install it, when nothing else is wrong."""
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  model = folders.make_model()
  path = str(folders.write_checkpoint(tmp_path / 'model', model, folders.draw(model)))
  file = tmp_path / 'q.jsonl'
  file.write_text(json.dumps({'context': 'x', 'choices': ['a', 'b'], 'answer': 0}))
  options = session.Options('float32')
  for task in ('arc_easy', str(file)):
    with pytest.raises(UserError, match=r'--tasks needs lm-eval: pip install -r \S+$') as error:
      session.run([path], [task], options)
    assert Path(str(error.value).split()[-1]).is_file()
  for checkpoints, task, word in (
    ([path], 'no.jsonl', 'no.jsonl'), ([], 'x', '--checkpoint'), ([path] * 2, 'x', 'twice'),
    ([path + '/no'], 'x', '/no'),
  ):  # fmt: skip
    with pytest.raises(UserError, match=word):
      session.run(checkpoints, [task], options)
  file.write_text(json.dumps({'prompt': 'x', 'test': 'x', 'entry_point': 'x'}))
  with pytest.raises(UserError, match='--allow_generated_code'):
    session.run([path], [str(file)], options)
