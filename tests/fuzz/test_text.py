"""Text in any encoding, of any length, in any file that may hold text; and prompts."""

import json

import pytest

from tests.hf import folders

ENCODINGS = ('utf-8-sig', 'utf-16', 'latin-1', 'shift_jis', 'cp037', 'utf-7')
WORDS = 'Grüße, ' * 50


def prepare(server, tmp_path, name: str, content: bytes, *flags: str):
  (tmp_path / 'x').mkdir(exist_ok=True)
  path = tmp_path / 'x' / name
  path.write_bytes(content)
  line = f'--input=x={path}', f'--output={tmp_path}/output', '--train_tokenizer=300', *flags
  return server.run('prepare', *line, '--valid_fraction=0', seconds=300)


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
