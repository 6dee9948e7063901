"""Text in any encoding, of any length, in any file that may hold text; and prompts."""

import gzip
import json
import zlib

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from bam_jax.data import documents
from tests.fuzz import values
from tests.hf import folders

ENCODINGS = ('utf-8-sig', 'utf-16', 'utf-32', 'latin-1', 'cp1252', 'shift_jis', 'cp037', 'utf-7')
WORDS = 'Grüße, ' * 50


def bomb(first: bytes, piece: bytes, count: int, last: bytes = b'') -> bytes:
  """A small gzipped file that unpacks to `count` pieces."""
  packer = zlib.compressobj(9, wbits=31)
  packed = [packer.compress(first), *(packer.compress(piece) for _ in range(count))]
  return b''.join([*packed, packer.compress(last), packer.flush()])


def prepare(server, tmp_path, name: str, content: bytes, *flags: str):
  (tmp_path / 'x').mkdir(exist_ok=True)
  path = tmp_path / 'x' / name
  path.write_bytes(content)
  line = f'--input=x={path}', f'--output={tmp_path}/output', '--train_tokenizer=300', *flags
  return server.run('prepare', *line, '--valid_fraction=0', seconds=300)


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.txt.gz', 'a.jsonl.gz', 'a.parquet'])
def test_any_bytes(server, tmp_path, name):
  @values.LONG
  @given(st.binary(max_size=100) | st.text(max_size=50).map(lambda text: text.encode('utf-16')))
  def try_one(content):
    for packed in (content, gzip.compress(content)) if name.endswith('.gz') else (content,):
      outcome = prepare(server, tmp_path, name, packed, f'--output={tmp_path}/{hash(packed)}')
      outcome.check(name, 'domain x')

  try_one()


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_any_encoding(server, tmp_path, encoding):
  """What is not UTF-8 is refused by name; nothing is guessed and nothing replaced."""
  text = WORDS if encoding not in ('shift_jis',) else 'おはよう' * 50
  for name, line in {
    'a.txt': text,
    'a.jsonl': json.dumps({'text': text}, ensure_ascii=False),
  }.items():
    outcome = prepare(server, tmp_path, name, line.encode(encoding), f'--output={tmp_path}/{name}')
    outcome.check(name)
    assert outcome.status == 2 or encoding in ('utf-7', 'utf-8-sig')


@pytest.mark.parametrize(
  'line',
  [
    '[]', '3', '"x"', 'null', '{}', '{"text": null}', '{"text": 3}', '{"text": ["x"]}',
    '{"text": "x"', '{"text": "\\ud800"}', '{"text": "x"} {"text": "y"}', '{"text": NaN}',
    '[' * 100_000, '{"text":' * 100_000, '{"text": "x", "n": ' + '1' * 5000 + '}', '\0',
    '{"text": "' + '\0' + '"}',
  ],
)  # fmt: skip
def test_json_lines_that_are_none(server, tmp_path, line):
  good = json.dumps({'text': 'fine'})
  outcome = prepare(server, tmp_path, 'a.jsonl', f'{good}\n{line}\n'.encode())
  assert outcome.check('a.jsonl, line 2').status == 2


@pytest.mark.slow
def test_bombs(server, tmp_path):
  """A gigabyte or more in a megabyte: a document is refused before memory is full."""
  blank = b' ' * 2**20
  quoted = bomb(b'{"text": "', blank, 1100, b'"}')
  for name, content in {
    'a.txt.gz': bomb(b'', blank, 1100),
    'b.txt.gz': bomb(b'', b'\n' * 2**20, 200),
    'a.jsonl.gz': quoted,
    'b.jsonl.gz': bomb(b'', b'\n' * 2**20, 10),
    'c.jsonl.gz': quoted[: len(quoted) // 2],
  }.items():
    assert prepare(server, tmp_path, name, content).check(name).status == 2


def test_parquet_of_other_things(server, tmp_path):
  (tmp_path / 'x').mkdir()
  path = tmp_path / 'x' / 'a.parquet'
  odd = {
    'numbers': pyarrow.table({'text': [1, 2]}),
    'nothing': pyarrow.table({'text': pyarrow.array([], pyarrow.string())}),
    'nulls': pyarrow.table({'text': pyarrow.array([None, 'x'], pyarrow.string())}),
    'bytes': pyarrow.table({'text': [b'\xff\xfe']}),
    'lists': pyarrow.table({'text': [['x']]}),
    'groups': pyarrow.table({'text': [{'x': 'y'}]}),
    'other columns': pyarrow.table({'text\x1b[31m': ['x']}),
    'no columns': pyarrow.table({}),
    'a large text': pyarrow.table({'text': ['x' * (documents.DOCUMENT_BYTES + 1)]}),
    'a wide text': pyarrow.table({'text': ['\U0001f600' * (documents.DOCUMENT_BYTES // 4 + 1)]}),
  }
  for name, table in odd.items():
    parquet.write_table(table, path)
    line = f'--input=x={path}', f'--output={tmp_path}/{name}', '--train_tokenizer=300'
    assert server.run('prepare', *line).check('a.parquet').status == 2, name


def test_a_prompt_of_no_tokens(server, world, tmp_path):
  (tmp_path / 'p.txt').write_text('\n \n')
  line = f'--checkpoint={world.dense}', '--max_new_tokens=1'
  assert server.run('generate', *line, f'--prompts={tmp_path}/p.txt').check('p.txt').status == 2
  assert server.run('generate', *line, '--prompt=').check().status == 0


@pytest.mark.slow
def test_a_prompt_of_a_hundred_thousand_tokens(server, tmp_path):
  """The model may ramble past what it was trained on; memory grows with the prompt alone."""
  model = folders.make_model(num_layers=1, num_heads=1, num_kv_heads=1)
  small = folders.write_checkpoint(tmp_path / 'small', model, folders.draw(model))
  (tmp_path / 'p.txt').write_text('\x7f' * 100_000)
  line = f'--checkpoint={small}', '--max_new_tokens=1', f'--prompts={tmp_path}/p.txt'
  assert server.run('generate', *line, seconds=900).check().status == 0


def test_more_than_the_memory_holds(server, world):
  line = f'--checkpoint={world.dense}', '--prompt=x', f'--max_new_tokens={2**31}'
  assert server.run('generate', *line).check('--max_new_tokens').status == 2
  sizes = '--config.model.d_model=1000000', '--config.model.ffn_dim=1000000'
  data = f'--config.data.path={world.data}', '--config.model.vocab_size=320'
  line = f'--config={world.recipe}', *sizes, *data, '--workdir=/dev/null/nowhere', '--runs=seed'
  outcome = server.run('main', *line)
  assert outcome.check('config.runs.seed').status == 2 and ' GB' in outcome.sentence


@pytest.mark.parametrize('encoding', ENCODINGS)
@pytest.mark.parametrize('name', ['p.txt', 'p.jsonl'])
def test_prompts_in_any_encoding(server, tmp_path, encoding, name):
  text = 'Grüße' if encoding != 'shift_jis' else 'おはよう'
  line = json.dumps({'prompt': text}, ensure_ascii=False) if name == 'p.jsonl' else text
  (tmp_path / name).write_bytes(line.encode(encoding))
  # Prompts are read before the checkpoint is.
  outcome = server.run('generate', '--checkpoint=nowhere', f'--prompts={tmp_path}/{name}')
  assert outcome.check(name, 'nowhere').status == 2
  assert (name in outcome.sentence) != (encoding in ('utf-8-sig', 'utf-7')), outcome.sentence


def test_prompts_of_any_bytes(server, tmp_path):
  @values.LONG
  @given(st.binary(max_size=60) | values.ODD.map(lambda odd: json.dumps({'prompt': odd}).encode()))
  def try_one(content):
    for name in ('p.txt', 'p.jsonl'):
      (tmp_path / name).write_bytes(content)
      outcome = server.run('generate', '--checkpoint=nowhere', f'--prompts={tmp_path}/{name}')
      assert outcome.check(name, 'nowhere').status == 2

  try_one()
