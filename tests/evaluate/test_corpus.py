"""What `--data` may name, and the sentences about what it may not."""

import gzip
import json
import types

import pytest

from bam_jax.errors import UserError
from bam_jax.evaluate import corpus
from bam_jax.prepare import training

TEXTS = ['the court shall', '', 'naïve café', 'z']


@pytest.fixture
def files(tmp_path):
  lines = [json.dumps({'text': text, 'body': text.upper()}) + '\n' for text in TEXTS]
  (tmp_path / 'law.jsonl').write_text(''.join(lines), encoding='utf-8')
  folder = tmp_path / 'code'
  folder.mkdir()
  (folder / 'train-0.txt').write_text('def f(x): return x', encoding='utf-8')
  (folder / 'valid-0.txt').write_text('x = 1', encoding='utf-8')
  (folder / 'test.txt.gz').write_bytes(gzip.compress(b'y = 2'))
  return tmp_path


def test_text_is_read_by_each_tokenizer(files, dataset):
  law, code = corpus.read([f'law={files}/law.jsonl', f'code={files}/code'], 'valid', 'text', None)
  assert (law.name, code.name) == ('law', 'code')
  full = [text for text in TEXTS if text]
  assert law.byte_counts.tolist() == [len(text.encode()) for text in full]
  tokenizers = dataset.tokenizer(), training.train(TEXTS, 258)
  for tokenizer in (*tokenizers, tokenizers[0]):
    law.check(tokenizer, 'any')
    documents = law.documents(tokenizer)
    assert [tokenizer.decode(tokens) for tokens in documents] == full
    for tokens in documents:
      assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id
  (tokens,) = code.documents(tokenizers[1])  # the valid file, and not what was trained on
  assert tokenizers[1].decode(tokens) == 'x = 1'


def test_text_is_what_prepare_makes_of_it(dataset):
  path = dataset.path.parent / 'text/law/valid.jsonl'
  (text,), tokenizer = corpus.read([f'law={path}'], 'valid', 'text', None), dataset.tokenizer()
  prepared = next(d for d in corpus.read([str(dataset.path)], 'valid', '', None) if d.name == 'law')
  found = [
    sorted((ids.tolist(), size) for ids, size in zip(d.documents(tokenizer), d.byte_counts))
    for d in (text, prepared)
  ]
  assert found[0] == found[1] and len(found[0]) == 6
  last = max(max(ids) for ids, _ in found[1])
  fewer = types.SimpleNamespace(vocab_size=last + 1, difference=lambda other: '')
  prepared.check(fewer, 'one')
  fewer.vocab_size = last
  with pytest.raises(UserError, match=rf'that of one \({last} is a word of the former alone\)'):
    prepared.check(fewer, 'one')


def test_options(files, dataset):
  (test,) = corpus.read([f'code={files}/code'], 'test', 'text', None)
  assert test.byte_counts.tolist() == [5]
  (marked,) = corpus.read([f'code={files}/code/train-0.txt'], 'valid', 'text', None)
  assert marked.byte_counts.tolist() == [18]  # a file is what was asked for
  (other,) = corpus.read([f'law={files}/law.jsonl'], 'valid', 'body', 2)
  assert [*map(int, other.byte_counts)] == [15, 12]  # the first two that hold something
  prepared = corpus.read([str(dataset.path), f'acts={files}/law.jsonl'], 'train', 'text', 3)
  assert [d.name for d in prepared] == ['code', 'general', 'law', 'math', 'acts']
  assert all(len(d.byte_counts) == len(d.documents(dataset.tokenizer())) == 3 for d in prepared)


@pytest.mark.parametrize('given, sentence', [
  ([], '--data=PREPARED_FOLDER or --data=DOMAIN=FILE is required'),
  (['{}/law.jsonl'], 'write --data=DOMAIN={}/law.jsonl'),
  (['a/b={}/law.jsonl'], 'a domain name has'), (['law={}/no.jsonl'], 'does not exist'),
  (['law={}/law.bin'], 'unknown file type'), (['law={}/bad.jsonl'], 'line 1 is not JSON'),
  (['law={}/law.jsonl', 'law={}/code'], 'the domain law is given twice'),
  (['law={}/empty.jsonl'], 'holds no document of the domain law'),
  (['code={}/split'], "no file of split 'valid': set --split to one of test"),
])  # fmt: skip
def test_mistakes(files, dataset, given, sentence):
  (files / 'empty.jsonl').write_text('{"text": ""}\n', encoding='utf-8')
  (files / 'bad.jsonl').write_text('{"text": "\n', encoding='utf-8')
  (files / 'law.bin').write_bytes(b'x')
  (files / 'split').mkdir()
  (files / 'split/test.txt').write_text('x', encoding='utf-8')
  with pytest.raises(UserError) as caught:
    corpus.read([item.format(files) for item in given], 'valid', 'text', None)
  assert sentence.format(files) in str(caught.value)
  with pytest.raises(UserError, match="no split 'test' of the domain code: it has train, valid"):
    corpus.read([str(dataset.path)], 'test', 'text', None)
