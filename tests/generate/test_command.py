"""`generate` as its users run it: a whole process on a checkpoint, and whole sentences."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.generate import generator
from bam_jax.upcycle.sources import open_checkpoint
from tests.hf import folders

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
  """A small mixture, and a tokenizer of fewer words than the model."""
  two = dict(attention_experts=config.AttentionExperts(2), ffn_experts=config.FFNExperts(2))
  model = folders.make_model('kv_experts', num_layers=1, **two)
  folder = tmp_path_factory.mktemp('run') / 'mixture'
  return folders.write_checkpoint(folder, model, folders.draw(model))


def test_one_prompt_streams_and_many_are_the_same(checkpoint, server, tmp_path):
  flags = f'--checkpoint={checkpoint}', '--max_new_tokens=12'
  one = server.run('generate', *flags, '--prompt=the cat', f'--json={tmp_path / "facts.json"}')
  assert (one.status, one.stderr) == (0, '')
  (fact,) = json.loads((tmp_path / 'facts.json').read_text())['rows']
  assert one.stdout == f'the cat{fact["text"]}\n'
  assert fact['reason'] in ('length', 'end') and len(fact['tokens']) <= 12
  prompts = tmp_path / 'prompts.jsonl'
  prompts.write_text('{"prompt": "the cat"}\n{"prompt": ""}\n', encoding='utf-8')
  flags = *flags, f'--prompts={prompts}', '--prompt=a', '--mesh=expert=2,data=2', '--json=-'
  devices = {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '4', 'PYTHONIOENCODING': 'utf-8'}
  line, how = [sys.executable, '-m', 'bam_jax.generate', *flags], dict(env=os.environ | devices)
  many = subprocess.run(line, cwd=ROOT, capture_output=True, encoding='utf-8', **how)
  assert many.returncode == 0, many.stderr
  facts = json.loads(many.stdout)  # and nothing else is there
  assert facts['mesh'] == {'data': 2, 'expert': 2, 'fsdp': 1, 'tensor': 1}
  assert [row['prompt'] for row in facts['rows']] == ['a', 'the cat', '']
  assert facts['rows'][1] == fact
  assert all(row['text'] in many.stderr for row in facts['rows'])


@pytest.mark.parametrize('flags, sentence', [
  (['--checkpoint=', '--prompt=x'], '--checkpoint=DIR is required'),
  ([], "--prompt='...' or --prompts=FILE is required"),
  ([os.fsdecode(b'--prompt=\xff\xfe')], 'is not UTF-8'),
  (['--prompt=x', '--num_samples=2'], 'set --temperature=1'),
  (['--prompt=x', '--mesh=data=64'], 'make mesh smaller'),
  (['--prompt=x', '--mesh=data=2,data=4'], '--mesh=data=4'),
])  # fmt: skip
def test_mistakes_are_one_sentence(checkpoint, server, flags, sentence):
  server.run('generate', f'--checkpoint={checkpoint}', *flags).check().refused(sentence)


def test_a_checkpoint_of_another_shape(tmp_path):
  other = folders.make_model('btx', ffn_dim=25)
  path = folders.write_checkpoint(tmp_path / 'run', other, folders.draw(folders.make_model('btx')))
  with pytest.raises(UserError, match=r'has blocks/ffn/\w+ of shape .* is expected: it is damaged'):
    generator.load(open_checkpoint(str(path)), 'float32', None)
