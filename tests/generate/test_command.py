"""`generate` as its users run it: a whole process on a checkpoint, and whole sentences."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from bam_jax import checkpoint, cli, config
from bam_jax.checkpoint import manifest
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.generate import generator
from bam_jax.model import transformer

ROOT = Path(__file__).parents[2]
MODEL = config.Model(
  vocab_size=280, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24,
  attention_experts=config.AttentionExperts(2), ffn_experts=config.FFNExperts(2),
)  # fmt: skip


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory) -> Path:
  """A run with one checkpoint of a small mixture, and its tokenizer: fewer words than the model."""
  folder = tmp_path_factory.mktemp('run')
  tokenizer = Tokenizer.train(['the cat sat on the mat '] * 50, 268)
  tokenizer.save(folder)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
    transformer.Network(MODEL, config.Compute()).abstract(),
  )
  meta = checkpoint.Meta(
    format=checkpoint.FORMAT, model=MODEL, sequence_length=64, tokenizer_hash=tokenizer.hash,
    tokenizer_path=str(folder), run='tiny', step=1, method=None, sources=(),
    versions=manifest.versions(), bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token,
  )  # fmt: skip
  checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', keep=1)
  checkpoints.save(1, params, {'count': np.zeros(())}, {}, meta)
  checkpoints.close()
  return folder


def door(*flags: str, devices: int = 1) -> subprocess.CompletedProcess:
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices), 'PYTHONIOENCODING': 'utf-8',
  }  # fmt: skip
  return subprocess.run(
    [sys.executable, '-m', 'bam_jax.generate', *flags],
    cwd=ROOT, env=environment, capture_output=True, text=True, encoding='utf-8',
    errors='surrogateescape',
  )  # fmt: skip


def test_one_prompt_streams_and_many_are_the_same(run_folder, tmp_path):
  flags = f'--checkpoint={run_folder}', '--max_new_tokens=12'
  one = door(*flags, '--prompt=the cat', f'--json={tmp_path / "facts.json"}')
  assert one.returncode == 0 and one.stderr == ''
  (fact,) = json.loads((tmp_path / 'facts.json').read_text())['rows']
  assert one.stdout == f'the cat{fact["text"]}\n'
  assert fact['reason'] in ('length', 'end') and len(fact['tokens']) <= 12
  prompts = tmp_path / 'prompts.jsonl'
  prompts.write_text('{"prompt": "the cat"}\n{"prompt": ""}\n', encoding='utf-8')
  flags = *flags, f'--prompts={prompts}', '--prompt=a', '--mesh=expert=2,data=2', '--json=-'
  many = door(*flags, devices=4)
  assert many.returncode == 0, many.stderr
  facts = json.loads(many.stdout)  # and nothing else is there
  assert facts['mesh'] == {'data': 2, 'expert': 2, 'fsdp': 1, 'tensor': 1}
  assert [row['prompt'] for row in facts['rows']] == ['a', 'the cat', '']
  assert facts['rows'][1] == fact
  assert all(row['text'] in many.stderr for row in facts['rows'])


def test_a_prompt_past_the_models_length(run_folder):
  done = door(f'--checkpoint={run_folder}', f'--prompt={"mat " * 150}', '--max_new_tokens=3')
  assert done.returncode == 0 and done.stdout.startswith('mat mat')
  assert 'was trained on sequences of 64' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.slow
def test_a_reader_that_has_seen_enough(run_folder):
  command = [sys.executable, '-m', 'bam_jax.generate', f'--checkpoint={run_folder}', '--prompt=x']
  process = subprocess.Popen(
    [*command, '--max_new_tokens=5000'], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  process.stdout.read(3)
  process.stdout.close()
  assert process.wait() != 0
  assert b'Traceback' not in process.stderr.read()


MISTAKES = {
  'no checkpoint': (('--prompt=x',), '--checkpoint=DIR is required'),
  'not a checkpoint': (('--checkpoint=/nowhere', '--prompt=x'), '/nowhere holds no checkpoint'),
  'no prompt': (('--checkpoint={}',), "--prompt='...' or --prompts=FILE is required"),
  'other bytes': (('--checkpoint={}', b'--prompt=\xff\xfe'), 'is not UTF-8'),
  'same samples': (('--checkpoint={}', '--prompt=x', '--num_samples=2'), 'give --temperature=1'),
  'too many devices': (('--checkpoint={}', '--prompt=x', '--mesh=data=64'), 'shrink mesh'),
}


@pytest.mark.parametrize(
  'name',
  [pytest.param(n, marks=() if n == 'other bytes' else pytest.mark.slow) for n in MISTAKES],
)
def test_mistakes_are_one_sentence(run_folder, name):
  flags, sentence = MISTAKES[name]
  done = door(*(f if isinstance(f, bytes) else f.format(run_folder) for f in flags))
  assert done.returncode == 2 and done.stdout == ''
  assert sentence in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize('items', [['pods=2'], ['data'], ['data=x'], ['data=2', 'data=4']])
def test_meshes_that_are_none(items):
  with pytest.raises(UserError, match='--mesh='):
    cli.parse_mesh(items)
  assert cli.parse_mesh(['data=2', 'expert=4']) == config.Mesh(data=2, expert=4)


def test_a_checkpoint_that_lost_an_array(run_folder, tmp_path):
  shutil.copytree(run_folder, tmp_path / 'run')
  meta = next((tmp_path / 'run').glob('checkpoints/*/meta/metadata'))
  facts = json.loads(meta.read_text())
  facts['model']['ffn_dim'] = 25
  meta.write_text(json.dumps(facts))
  shutil.rmtree(meta.parents[1] / 'checksums')  # which would notice first
  with pytest.raises(UserError, match=r'has blocks/ffn/\w+ of shape .* is wanted: it is damaged'):
    generator.load(str(tmp_path / 'run'), 'float32')
