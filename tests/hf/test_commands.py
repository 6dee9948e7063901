"""`convert import-hf` and `convert export-hf` as their users run them, up to training and back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bam_jax import checkpoint
from tests.hf import folders
from tests.hf.folders import CONFIG, cohere_tensors

ROOT = Path(__file__).parent.parent.parent


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
  kept = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_NUM_CPU_DEVICES')}
  return subprocess.run(
    [sys.executable, '-m', f'bam_jax.{module}', *arguments], cwd=ROOT, capture_output=True,
    text=True, timeout=300, env=kept | {'JAX_PLATFORMS': 'cpu'},
  )  # fmt: skip


RECIPE = """
from ml_collections import ConfigDict


def get_config(arg):
  init, data = arg.split(',')
  run = dict(
    label='tuned', init=dict(checkpoint=init), data=dict(cats=1.0), tokens=2 * 4 * 16, batch_size=4,
    schedule=dict(peak_learning_rate=1e-3, warmup_steps=0),
  )
  model = dict(
    vocab_size=270, d_model=24, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=4, ffn_dim=20
  )
  return ConfigDict(dict(
    name='tune', model=model, data=dict(path=data, sequence_length=16), runs=dict(tuned=run),
    evaluation=dict(batch_size=4, tokens=64),
  ))
"""


@pytest.mark.slow
def test_a_model_of_transformers_is_a_seed_and_goes_back(tmp_path):
  source = folders.write_hf(tmp_path / 'hf', CONFIG, cohere_tensors())
  seed, data, work = tmp_path / 'seed', tmp_path / 'data', tmp_path / 'work'
  done = run('convert', 'import-hf', f'--input={source}', f'--output={seed}', '--json=-')
  assert done.returncode == 0, done.stderr
  facts = json.loads(done.stdout)
  assert facts['output'] == str(seed) and facts['meta']['model']['d_model'] == 24
  assert str(seed) in facts['meta']['manifest']['command']

  (tmp_path / 'cats').mkdir()
  for split, count in (('train', 30), ('valid', 5)):
    lines = [json.dumps({'text': f'the cat sat on the mat {n}'}) for n in range(count)]
    (tmp_path / 'cats' / f'{split}.jsonl').write_text('\n'.join(lines) + '\n')
  tokenizer = f'--tokenizer={seed}/tokenizer.json'
  done = run('prepare', f'--input=cats={tmp_path}/cats', f'--output={data}', tokenizer)
  assert done.returncode == 0, done.stderr
  (tmp_path / 'recipe.py').write_text(RECIPE)
  done = run('main', f'--config={tmp_path}/recipe.py:{seed},{data}', f'--workdir={work}')
  assert done.returncode == 0, done.stderr
  assert checkpoint.read_meta(work / 'tuned').tokenizer_hash == facts['meta']['tokenizer_hash']

  exported = tmp_path / 'exported'
  done = run(
    'convert', 'export-hf', f'--checkpoint={work}/tuned', f'--output={exported}',
    '--max_shard_size=10KB', '--dtype=bfloat16', '--json=-',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  facts = json.loads(done.stdout)
  assert facts['architecture'] == 'CohereForCausalLM' and facts['dtype'] == 'bfloat16'
  assert {path.name for path in exported.glob('*.safetensors')} == set(facts['files'])
  written = folders.read_json(exported / 'config.json')
  assert written['max_position_embeddings'] == 16
  again = tmp_path / 'again'
  done = run('convert', 'import-hf', f'--input={exported}', f'--output={again}', '--dtype=bfloat16')
  assert done.returncode == 0, done.stderr
  trained, back = (folders.read_checkpoint(checkpoint.find(x)) for x in (work / 'tuned', again))
  for path, array in trained.items():
    np.testing.assert_array_equal(array.astype(back[path].dtype), back[path])
  before = folders.read_checkpoint(seed)['embed/table']
  assert (trained['embed/table'] != before).any(), 'two steps move the model'


@pytest.mark.parametrize(
  'arguments, named',
  [
    (['import-hf'], '--input and --output are required'),
    (['import-hf', '--input={bloom}', '--output={out}'], 'BloomForCausalLM'),
    (
      ['export-hf', '--checkpoint=x', '--output={out}', '--max_shard_size=5XB'],
      '5XB is not a size',
    ),
  ],
)
def test_mistakes_are_one_sentence(server, tmp_path, arguments, named):
  facts = CONFIG | {'architectures': ['BloomForCausalLM']}
  bloom = folders.write_hf(tmp_path / 'bloom', facts, cohere_tensors())
  out = tmp_path / 'out'
  done = server.run('convert', *(a.format(bloom=bloom, out=out) for a in arguments))
  assert done.status == 2 and named in done.stderr, done.stderr
  assert len(done.stderr.strip().splitlines()) == 1 and not out.exists()
