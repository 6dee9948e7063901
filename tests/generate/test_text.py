"""Text as it comes: no half characters, no beginnings of stops, and prompts of any kind."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models

from bam_jax.data.tokenizer import HUGGING_FACE_FILE, Tokenizer
from bam_jax.errors import UserError
from bam_jax.generate import text
from bam_jax.prepare import training

WORDS = 'Größe Москва 東京 🦀🦀 naïve end. '


@pytest.fixture(scope='module', params=['byte level', 'byte fallback'])
def tokenizer(request) -> Tokenizer:
  """Bytes and hardly more: characters are spelled by several tokens."""
  if request.param == 'byte level':
    return training.train(['the cat sat on the mat '] * 50, 270)
  words = ['<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), *' .#acehmnotz']
  model = models.BPE({word: n for n, word in enumerate(words)}, [], byte_fallback=True)
  (made := tokenizers.Tokenizer(model)).decoder = decoders.ByteFallback()  # runs, all or nothing
  return Tokenizer(made.to_str().encode(), HUGGING_FACE_FILE)


def pieces(tokenizer, prompt: str, continuation: str, stops=()) -> tuple[list[str], object]:
  shown, prompt = [], [tokenizer.bos_id, *tokenizer.encode(prompt)]
  one = text.Continuation(tokenizer, prompt, stops, shown.append)
  for token in tokenizer.encode(continuation):
    one.add([token])
  one.finish()
  return shown, one


@pytest.mark.parametrize('prompt', ['', 'the', 'Привет, '])
def test_no_half_character_is_shown(tokenizer, prompt):
  shown, one = pieces(tokenizer, prompt, WORDS * 8)
  assert all('\ufffd' not in piece for piece in shown)
  assert ''.join(shown) == one.text == WORDS * 8
  assert max(map(len, shown)) < 12  # and nothing waits for the end
  whole = text.Continuation(tokenizer, [tokenizer.bos_id])
  whole.add(tokenizer.encode(WORDS))
  whole.finish()
  assert whole.text == WORDS


@pytest.mark.parametrize('stops, wanted', [
  (['end.'], 'a e en the '), (['zzz', ''], 'a e en the end. more'), (['m', ' e'], 'a'),
])  # fmt: skip
def test_stops(tokenizer, stops, wanted):
  shown, one = pieces(tokenizer, 'x', 'a e en the end. more', stops)
  assert ''.join(shown) == one.text == wanted
  assert one.stopped == (wanted != 'a e en the end. more')
  assert tokenizer.decode(one.tokens).startswith(wanted)


def test_nothing_of_a_stop_is_shown_before_it_is_whole(tokenizer):
  shown, one = pieces(tokenizer, '', 'a##b###c', ['###'])
  assert ''.join(shown) == 'a##b' and '#' not in shown[1]
  assert one.stopped and one.add(tokenizer.encode('more')) and ''.join(shown) == 'a##b'


def test_files_of_prompts(tmp_path):
  lines, objects = tmp_path / 'a.txt', tmp_path / 'a.jsonl'
  lines.write_bytes('\ufefföne\r\n\n two \n'.encode())
  assert text.read_prompts(str(lines)) == ['öne', ' two ']
  facts = [{'prompt': 'a\nb'}, {'prompt': '', 'id': 3}]
  objects.write_text('\n'.join(map(json.dumps, facts)), encoding='utf-8')
  assert text.read_prompts(str(objects)) == ['a\nb', '']


def test_files_that_are_refused(tmp_path):
  # tests/data has what else may be wrong with a file of documents.
  file, other = tmp_path / 'a.txt', tmp_path / 'a.jsonl'
  file.write_bytes(b'\n \n')
  other.write_bytes(b'{"text": "x"}')
  for path, sentence in (
    (file, 'holds no prompt'), (other, r"a\.jsonl, line 1 has no field 'prompt': add it\.$"),
    (tmp_path / 'a.csv', r'must end in one of \.jsonl'), (tmp_path / 'no.txt', 'cannot be read'),
  ):  # fmt: skip
    with pytest.raises(UserError, match=sentence):
      text.read_prompts(str(path))
