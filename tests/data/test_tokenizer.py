"""Tokenizers: lossless, deterministic, the same interface over both file formats."""

import io
import json
import pickle
import random
import signal
import subprocess
import sys
import time

import hypothesis
import hypothesis.strategies as st
import pytest
import sentencepiece
import tokenizers

from bam_jax.data.tokenizer import MAX_PRE_TOKEN, Tokenizer
from bam_jax.errors import UserError

TEXTS = [f'The {i}th whale swam; def f(x): return x + {i}\n' for i in range(200)]
BYTE_LEVEL = Tokenizer.train(TEXTS, 280)


@pytest.fixture(scope='module')
def sentence_piece():
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=60, minloglevel=2
  )
  return model.getvalue()


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text())
@hypothesis.example('<|bos|>a<|eos|>')
@hypothesis.example(' \t\r\n  ١٢٣ é é \x00 🧬\u2028')
def test_byte_level_round_trip(text):
  ids = BYTE_LEVEL.encode(text)
  assert BYTE_LEVEL.decode(ids) == text
  assert BYTE_LEVEL.bos_id not in ids and BYTE_LEVEL.eos_id not in ids


def test_training_is_deterministic_across_processes():
  code = (
    'from bam_jax.data.tokenizer import Tokenizer;'
    'texts = [f"The {i}th whale swam; def f(x): return x + {i}\\n" for i in range(200)];'
    'print(Tokenizer.train(texts, 280).hash)'
  )
  other = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert other.stdout.strip() == BYTE_LEVEL.hash


def test_trained_vocabulary():
  assert (BYTE_LEVEL.bos_id, BYTE_LEVEL.eos_id, BYTE_LEVEL.vocab_size) == (0, 1, 280)
  assert len(BYTE_LEVEL.encode(TEXTS[0])) < len(TEXTS[0]) / 2
  assert len(BYTE_LEVEL.encode('1234')) == 4
  with pytest.raises(UserError, match='--train_tokenizer=257 is not from 258 to'):
    Tokenizer.train(TEXTS, 257)


def test_batch_is_one_by_one_and_special_tokens_are_skipped_when_decoding():
  assert BYTE_LEVEL.encode_batch(TEXTS) == [BYTE_LEVEL.encode(text) for text in TEXTS]
  assert BYTE_LEVEL.decode([0, *BYTE_LEVEL.encode('whale'), 1]) == 'whale'


def test_training_on_runs_without_spaces_takes_linear_time_and_does_not_change_others():
  chance = random.Random(0)
  dna = ''.join(chance.choices('ACGT', k=400_000))
  start = time.process_time()
  tokenizer = Tokenizer.train([dna], 512)
  assert time.process_time() - start < 10  # 28 s without the bound
  assert tokenizer.decode(tokenizer.encode(dna)) == dna
  assert (
    json.loads(tokenizer._content)['pre_tokenizer']
    == json.loads(BYTE_LEVEL._content)['pre_tokenizer']
  ), 'the bound is of training alone'
  whole = 'x' * MAX_PRE_TOKEN
  assert Tokenizer.train([whole], 262).encode(whole) == Tokenizer.train([whole * 3], 262).encode(
    whole
  )


def test_ctrl_c_ends_the_training():
  code = (
    'import os; from bam_jax.data.tokenizer import Tokenizer;'
    'texts = [os.urandom(20_000_000).hex()];'
    'print("ready", flush=True); Tokenizer.train(texts, 100_000)'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == 'ready\n'
  time.sleep(0.5)
  process.send_signal(signal.SIGINT)
  assert 'KeyboardInterrupt' in process.communicate(timeout=10)[1]


def test_save_and_load_are_exact(tmp_path, sentence_piece):
  (tmp_path / 'm.model').write_bytes(sentence_piece)
  for tokenizer in (BYTE_LEVEL, Tokenizer.load(tmp_path / 'm.model')):
    folder = tmp_path / tokenizer.file_name.split('.')[1]
    folder.mkdir()
    path = tokenizer.save(folder)
    copy = pickle.loads(pickle.dumps(tokenizer))
    for again in (Tokenizer.load(folder), Tokenizer.load(path), copy):
      assert again.hash == tokenizer.hash
      assert again.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])


def test_sentence_piece(sentence_piece):
  tokenizer = Tokenizer(sentence_piece, 'tokenizer.model')
  assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.vocab_size) == ('<s>', '</s>', 60)
  ids = tokenizer.encode('The whale swam')
  assert tokenizer.bos_id not in ids
  assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == 'The whale swam'


def hugging_face(*specials):
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={'a': 0, 'b': 1}, merges=[]))
  tokenizer.add_special_tokens(list(specials))
  return tokenizer


@pytest.mark.parametrize(
  'specials, names',
  [
    (
      ['<EOS_TOKEN>', '<BOS_TOKEN>', '<|END_OF_TURN_TOKEN|>'],
      ('<BOS_TOKEN>', '<|END_OF_TURN_TOKEN|>'),
    ),
    (['<|endoftext|>'], ('<|endoftext|>', '<|endoftext|>')),
    (['<|begin_of_text|>', '<|end_of_text|>'], ('<|begin_of_text|>', '<|end_of_text|>')),
  ],
)
def test_well_known_tokens(specials, names):
  tokenizer = Tokenizer(hugging_face(*specials).to_str().encode(), 'tokenizer.json')
  assert (tokenizer.bos_token, tokenizer.eos_token) == names


def test_truncation_padding_and_dropout_of_the_file_are_off():
  file = hugging_face('<s>', '</s>')
  file.enable_truncation(2)
  file.enable_padding(length=9)
  tokenizer = Tokenizer(file.to_str().encode(), 'tokenizer.json')
  assert tokenizer.encode('abab') == [0, 1, 0, 1]
  assert tokenizer.switched_off == ('truncation', 'padding')
  facts = json.loads(BYTE_LEVEL._content)
  facts['model']['dropout'] = 0.5
  tokenizer = Tokenizer(json.dumps(facts).encode(), 'tokenizer.json')
  assert tokenizer.switched_off == ('dropout',) and not BYTE_LEVEL.switched_off
  assert tokenizer.encode_batch(TEXTS) == BYTE_LEVEL.encode_batch(TEXTS)


def test_errors(tmp_path):
  path = tmp_path / 'tokenizer.json'
  with pytest.raises(UserError, match='holds no tokenizer.json'):
    Tokenizer.load(tmp_path)
  with pytest.raises(UserError, match='cannot be read'):
    Tokenizer.load(path)
  with pytest.raises(UserError, match='is not a tokenizer'):
    Tokenizer.load(tmp_path / 'vocab.bin')
  path.write_text('{}')
  with pytest.raises(UserError, match=f'{path} is not a tokenizer.json'):
    Tokenizer.load(path)
  (tmp_path / 'x.model').write_bytes(b'nonsense')
  with pytest.raises(UserError, match='is not a SentencePiece model'):
    Tokenizer.load(tmp_path / 'x.model')
  path.write_text(hugging_face('<begin>').to_str())
  with pytest.raises(UserError, match='well-known tokens .*: set --bos_token'):
    Tokenizer.load(path)
  with pytest.raises(UserError, match='well-known tokens .*: set --eos_token'):
    Tokenizer.load(path, bos_token='<begin>')
  with pytest.raises(UserError, match="no token '<end>': correct --eos_token"):
    Tokenizer.load(path, bos_token='<begin>', eos_token='<end>')
  assert Tokenizer.load(path, bos_token='<begin>', eos_token='a').eos_id == 0


def test_a_panic_of_the_library_is_a_sentence():
  facts = json.loads(hugging_face('<begin>').to_str())
  facts['normalizer'] = {'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}
  with pytest.raises(UserError, match='is not a tokenizer.json'):
    Tokenizer(json.dumps(facts).encode(), 'tokenizer.json', '<begin>', '<begin>')


def test_what_a_tokenizer_cannot_encode_is_a_sentence():
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<begin>': 0, 'a': 1}, '<unknown>'))
  tokenizer = Tokenizer(words.to_str().encode(), 'tokenizer.json', '<begin>', '<begin>')
  assert tokenizer.encode('a') == [1]
  with pytest.raises(UserError, match='The tokenizer cannot encode a text'):
    tokenizer.encode('b')


class PanicException(BaseException):
  pass


@pytest.mark.parametrize(
  'raised, told', [(PanicException, UserError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_a_panic_while_encoding_is_a_sentence(monkeypatch, raised, told):
  tokenizer = Tokenizer(hugging_face('<s>', '</s>').to_str().encode(), 'tokenizer.json')

  class Library:
    def encode_batch_fast(self, texts, **options):
      raise raised('index out of bounds')

  monkeypatch.setattr(tokenizer._backend, '_tokenizer', Library())
  with pytest.raises(told, match='cannot encode .*out of bounds' if told is UserError else None):
    tokenizer.encode('a')
