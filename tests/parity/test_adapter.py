"""What lm-eval asks of an adapter: texts whose tokens join, texts of nothing, and examples."""

import json

import pytest

from bam_jax.errors import UserError
from bam_jax.evaluate import comparison
from tests.evaluate.folders import write_checkpoint
from tests.hf.folders import make_model
from tests.upcycle import memory

pytest.importorskip('lm_eval', reason='lm-eval is an extra: make test-parity installs it')

from lm_eval.api.instance import Instance  # noqa: E402

from bam_jax.prepare import training
from bam_jax.tasks import adapter, session  # noqa: E402


@pytest.fixture(scope='module')
def path(tmp_path_factory) -> str:
  """A model whose tokenizer has whole words, so that half a word and its rest are other tokens."""
  tokenizer = training.train(['the answer hello world until whale captain'] * 50, 400)
  model = make_model(vocab_size=400)
  folder = tmp_path_factory.mktemp('runs') / 'run'
  return str(write_checkpoint(folder, model, memory.draw(model, 0), tokenizer))


def scores(model: adapter.Model, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
  requests = [Instance('loglikelihood', {}, pair, n) for n, pair in enumerate(pairs)]
  return model.loglikelihood(requests, disable_tqdm=True)


@pytest.mark.parametrize('context, continuation', [
  ('the ans', 'wer'), ('hello wor', 'ld'), ('until wha', 'le captain'),
])  # fmt: skip
def test_a_token_that_spans_the_join_loses_nothing_of_the_continuation(path, context, continuation):
  model = adapter.Model(path)
  whole, alone = model.tok_encode(context + continuation), model.tok_encode(continuation, False)
  before, tokens = model._encode_pair(context, continuation)
  assert whole[: len(before)] != before == model.tok_encode(context) and tokens == alone
  (joined,), (of_tokens,) = (
    scores(model, (context, continuation)),
    model._loglikelihood_tokens([(None, before, alone)]),
  )
  assert joined == of_tokens and joined[0] < 0


def test_other_pairs_are_cut_as_lm_eval_cuts_them(path):
  model = adapter.Model(path)
  for pair in (('the answer', ' world'), ('the  ', 'world'), (' ', 'world'), ('the ', '')):
    assert model._encode_pair(*pair) == super(adapter.Model, model)._encode_pair(*pair)
  alone, after_nothing, empty = scores(model, ('', 'world'), (' ', 'world'), ('the', ''))
  assert alone[0] < 0 and after_nothing[0] < 0 and alone != after_nothing
  assert empty == (0.0, True)


def test_a_text_without_a_token_is_refused(path, monkeypatch):
  model = adapter.Model(path)
  monkeypatch.setattr(model._tokenizer, 'encode', lambda text: [5] if 'the' in text else [])
  with pytest.raises(UserError, match="has no token for '🙂', which cannot be scored"):
    scores(model, ('the', '🙂'))


def test_as_many_examples_as_asked_for(path, tmp_path):
  names, most = ['world', 'whale', 'captain', 'answer'], 3
  rows = [{'context': f'{name}, the', 'choices': ['a', 'b'], 'answer': 0} for name in names]
  (tmp_path / 'mine.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  task = {
    'task': 'mine', 'dataset_path': 'json', 'test_split': 'test', 'fewshot_split': 'test',
    'dataset_kwargs': {
      'data_files': {'test': f'{tmp_path}/mine.jsonl'}, 'cache_dir': f'{tmp_path}/cache'
    },
    'output_type': 'multiple_choice', 'doc_to_text': 'context', 'doc_to_choice': 'choices',
    'doc_to_target': 'answer',
  }  # fmt: skip
  file = tmp_path / 'mine.yaml'
  file.write_text(json.dumps(task))
  options = comparison.Options('float32', few_shot=most)
  facts = session.run([path], [str(file)], options)
  with pytest.raises(UserError, match='--few_shot=4: mine has fewer solved examples'):
    session.run([path], [str(file)], options._replace(few_shot=most + 1))
  assert facts['rows'][0]['n-shot']['mine'] == most
