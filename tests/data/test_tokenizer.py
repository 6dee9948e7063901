"""Tokenizers: lossless, deterministic, the same interface over both file formats."""

import io
import json
import signal
import subprocess
import sys
import time

import hypothesis
import hypothesis.strategies as st
import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.prepare import training

TEXTS = [f'The {i}th whale swam; def f(x): return x + {i}\n' for i in range(200)]
BYTE_LEVEL = training.train(TEXTS, 280)


def pieces(**options) -> bytes:
  how = dict(sentence_iterator=iter(TEXTS), vocab_size=60, minloglevel=2) | options
  sentencepiece.SentencePieceTrainer.train(model_writer=(model := io.BytesIO()), **how)
  return model.getvalue()


@pytest.fixture(scope='module')
def sentence_piece():
  return pieces()


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text())
@hypothesis.example('<|bos|>a<|eos|>')
@hypothesis.example(' \t\r\n  ١٢٣ é é \x00 🧬\u2028')
def test_byte_level_round_trip(text):
  ids = BYTE_LEVEL.encode(text)
  assert BYTE_LEVEL.decode(ids) == text
  assert BYTE_LEVEL.bos_id not in ids and BYTE_LEVEL.eos_id not in ids


def test_trained_vocabulary():
  assert (BYTE_LEVEL.bos_id, BYTE_LEVEL.eos_id, BYTE_LEVEL.vocab_size) == (0, 1, 280)
  assert len(BYTE_LEVEL.encode(TEXTS[0])) < len(TEXTS[0]) / 2
  assert len(BYTE_LEVEL.encode('1234')) == 4
  with pytest.raises(UserError, match='--train_tokenizer=257 is not from 258 to'):
    training.train(TEXTS, 257)


def test_a_run_without_spaces_is_cut_in_training():
  piece = 'x' + 'a' * (training.MAX_PRE_TOKEN - 2) + 'y'  # only two of them, joined, have `yx`
  assert training.train([4 * piece], 300)._content == training.train(4 * [piece], 300)._content


def test_save_and_load_are_exact(tmp_path, sentence_piece):
  (tmp_path / 'm.model').write_bytes(sentence_piece)
  for tokenizer in (BYTE_LEVEL, Tokenizer.load(tmp_path / 'm.model')):
    folder = tmp_path / tokenizer.file_name.split('.')[1]
    folder.mkdir()
    path = tokenizer.save(folder)
    if path.suffix == '.json':
      path.write_text(f'\ufeff{path.read_text()}')  # as some editors do
    for again in (Tokenizer.load(folder), Tokenizer.load(path)):
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


@pytest.mark.parametrize('specials, names', [
  (
    ['<EOS_TOKEN>', '<BOS_TOKEN>', '<|END_OF_TURN_TOKEN|>'],
    ('<BOS_TOKEN>', '<|END_OF_TURN_TOKEN|>'),
  ),
  (['<|endoftext|>'], ('<|endoftext|>', '<|endoftext|>')),
])  # fmt: skip
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


def added(model, special: bool) -> tokenizers.Tokenizer:
  """A tokenizer whose `<s>` and `</s>` are added tokens, special or not."""
  made = tokenizers.Tokenizer(model)
  tokens = [tokenizers.AddedToken(name, special=special) for name in ('<s>', '</s>')]
  (made.add_special_tokens if special else made.add_tokens)(tokens)
  return made


LETTERS = ['<unk>', '<s>', '</s>', *'ab </s>']
UNIGRAM = tokenizers.models.Unigram([(word, -1.0) for word in dict.fromkeys(LETTERS)], unk_id=0)
WORDS = {word: number for number, word in enumerate(dict.fromkeys(LETTERS))}


@pytest.mark.parametrize('content', [
  added(UNIGRAM, True),
  added(UNIGRAM, False),
  added(tokenizers.models.BPE(WORDS, [], unk_token='<unk>'), False),
  added(tokenizers.models.WordLevel(WORDS, '<unk>'), True),
  pieces(vocab_size=70, bos_id=-1, eos_id=-1, user_defined_symbols=['<s>', '</s>']),
], ids=['unigram', 'unigram, not special', 'bpe, not special', 'words', 'user'])  # fmt: skip
def test_no_text_has_the_id_of_bos_or_eos(content):
  """HTML has `<s>` and `</s>`, which must not end a document."""
  name = 'tokenizer.model' if isinstance(content, bytes) else 'tokenizer.json'
  content = content if isinstance(content, bytes) else content.to_str().encode()
  tokenizer = Tokenizer(content, name, '<s>', '</s>')
  plain, marked = tokenizer.encode_batch(['a b', 'a </s> b <s>'])
  assert not {tokenizer.bos_id, tokenizer.eos_id} & {*plain, *marked}
  assert tokenizer.encode('a b') == plain and len(marked) > 0


def test_tokenizers_are_compared_by_what_they_do(sentence_piece):
  facts = json.loads(BYTE_LEVEL._content)
  again = lambda facts: Tokenizer(json.dumps(facts).encode(), 'tokenizer.json')
  assert again(facts).hash != BYTE_LEVEL.hash and BYTE_LEVEL.difference(again(facts)) == ''
  facts['added_tokens'].append(facts['added_tokens'][1] | {'id': 280, 'content': '<|im_end|>'})
  assert BYTE_LEVEL.difference(again(facts)) == again(facts).difference(BYTE_LEVEL) == ''
  facts['model']['merges'] = facts['model']['merges'][::-1]
  assert BYTE_LEVEL.difference(again(facts)) == 'their model differs'
  facts = json.loads(BYTE_LEVEL._content)
  facts['model']['vocab'] |= {'a': facts['model']['vocab']['b'], 'b': facts['model']['vocab']['a']}
  assert "'a' in one and 'b' in the other" in BYTE_LEVEL.difference(again(facts))
  pieces = Tokenizer(sentence_piece, 'tokenizer.model')
  proto = sentencepiece_model_pb2.ModelProto.FromString(sentence_piece)
  proto.trainer_spec.model_prefix = 'elsewhere'
  assert pieces.difference(Tokenizer(proto.SerializeToString(), 'tokenizer.model')) == ''
  proto.pieces[40].score -= 1
  assert '40 is' in pieces.difference(Tokenizer(proto.SerializeToString(), 'tokenizer.model'))
  assert 'bos_token' in pieces.difference(BYTE_LEVEL)


def test_an_interrupt_ends_training():
  """The library would go on for a minute; the process ends at once."""
  program = (
    'from bam_jax.data.tokenizer import Tokenizer; import random; r = random.Random(0);'
    'texts = ["".join(r.choices("abcdefgh ", k=400_000)) for _ in range(40)];'
    'print("taken", flush=True); training.train(texts, 60_000)'
  )
  pipes = dict.fromkeys(('stdout', 'stderr'), subprocess.PIPE)
  with subprocess.Popen([sys.executable, '-c', program], text=True, **pipes) as process:
    assert process.stdout.readline() == 'taken\n'
    time.sleep(1)
    began = process.send_signal(signal.SIGINT) or time.monotonic()
    process.communicate(timeout=60)
  assert process.returncode in (1, 130, -2) and time.monotonic() - began < 10
