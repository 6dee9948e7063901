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
from tests.hf import folders

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
  """A small mixture, and a tokenizer of fewer words than the model."""
  two = dict(attention_experts=config.AttentionExperts(2), ffn_experts=config.FFNExperts(2))
  model = folders.make_model('kv_experts', num_layers=1, **two)
  folder = tmp_path_factory.mktemp('run') / 'mixture'
  return folders.write_checkpoint(folder, model, folders.draw(model))


def start(*flags: str, devices: int = 1) -> subprocess.Popen:
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices), 'PYTHONIOENCODING': 'utf-8',
  }  # fmt: skip
  return subprocess.Popen(
    [sys.executable, '-m', 'bam_jax.generate', *flags],
    cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8',
  )  # fmt: skip


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
  many = start(*flags, devices=4)
  stdout, stderr = many.communicate()
  assert many.returncode == 0, stderr
  facts = json.loads(stdout)  # and nothing else is there
  assert facts['mesh'] == {'data': 2, 'expert': 2, 'fsdp': 1, 'tensor': 1}
  assert [row['prompt'] for row in facts['rows']] == ['a', 'the cat', '']
  assert facts['rows'][1] == fact
  assert all(row['text'] in stderr for row in facts['rows'])


MISTAKES = {
  'no checkpoint': (('--prompt=x',), '--checkpoint=DIR is required'),
  'no prompt': (('--checkpoint={}',), "--prompt='...' or --prompts=FILE is required"),
  'other bytes': (('--checkpoint={}', b'--prompt=\xff\xfe'), 'is not UTF-8'),
  'same samples': (('--checkpoint={}', '--prompt=x', '--num_samples=2'), 'set --temperature=1'),
  'too many devices': (('--checkpoint={}', '--prompt=x', '--mesh=data=64'), 'make mesh smaller'),
  'an axis twice': (('--checkpoint={}', '--prompt=x', '--mesh=data=2,data=4'), '--mesh=data=4'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_are_one_sentence(checkpoint, server, name):
  flags, sentence = MISTAKES[name]
  flags = [os.fsdecode(f) if isinstance(f, bytes) else f.format(checkpoint) for f in flags]
  done = server.run('generate', *flags).check()
  assert (done.status, done.stdout) == (2, '')
  assert sentence in done.stderr and done.stderr.count('\n') == 1


def test_a_checkpoint_of_another_shape(tmp_path):
  model = folders.make_model('btx')
  values = folders.draw(model)
  other = folders.make_model('btx', ffn_dim=25)
  path = folders.write_checkpoint(tmp_path / 'run', other, values)
  with pytest.raises(UserError, match=r'has blocks/ffn/\w+ of shape .* is expected: it is damaged'):
    generator.load(str(path), other, folders.make_tokenizer(), 'float32', None)
