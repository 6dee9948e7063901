"""`convert add-expert`, `drop-expert` and `replace-expert` as their users run them."""

import json

import numpy as np
import pytest

from bam_jax import checkpoint
from tests.hf import folders


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """A mixture of three, a folder of transformers, and its import."""
  folder = tmp_path_factory.mktemp('world')
  model = folders.make_model('kv_experts')
  names = dict(sources=('seed', 'code', 'law'), method='bam_kv_experts')
  folders.write_checkpoint(folder / 'bam', model, folders.draw(model), **names)
  folders.write_hf(folder / 'hub', folders.CONFIG, folders.cohere_tensors(folders.CONFIG, 7))
  return folder


def run(server, world, command: str, *flags: str) -> dict:
  done = server.run(f'convert {command}', *flags, '--json=-', folder=world)
  assert done.status == 0, done.stderr
  return json.loads(done.stdout)


def test_there_and_back(server, world):
  """A folder of transformers becomes the expert that its import does."""
  run(server, world, 'import-hf', '--input=hub', '--output=imported')
  made = {}
  for source in ('hub', 'imported'):
    flags = '--checkpoint=bam', f'--from={source}', f'--output=with_{source}', '--router_init=zero'
    facts = run(server, world, 'add-expert', *flags)
    assert facts['output'] == f'with_{source}' and facts['seconds'] > 0
    names = ['seed', 'code', 'law', facts['meta']['manifest']['sources'][1]['run']]
    assert facts['meta']['sources'] == names
    made[source] = folders.read_checkpoint(world / f'with_{source}')
  for path, array in made['imported'].items():
    np.testing.assert_array_equal(made['hub'][path], array, err_msg=path, strict=True)
  run(server, world, 'drop-expert', '--checkpoint=with_hub', '--expert=3', '--output=back')
  for path, array in folders.read_checkpoint(world / 'back').items():
    before = folders.read_checkpoint(world / 'bam')[path]
    np.testing.assert_array_equal(array, before, err_msg=path, strict=True)
  flags = '--checkpoint=bam', '--from=hub', '--expert=code', '--output=other'
  facts = run(server, world, 'replace-expert', *flags)
  assert facts['meta']['manifest']['grown']['experts'] == [0, -1, 2]
  assert checkpoint.read_meta(world / 'other').manifest.command.endswith('--json=-')
  assert server.run('convert inspect', 'other', folder=world).check().status == 0


def test_generating_without_an_expert(server, world):
  """What a checkpoint without it generates."""
  run(server, world, 'drop-expert', '--checkpoint=bam', '--expert=code', '--output=two')
  made = []
  for flags in (['--checkpoint=bam', '--without=code'], ['--checkpoint=two'], ['--checkpoint=bam']):
    done = server.run('generate', '--prompt=the cat', '--json=-', *flags, folder=world)
    assert done.status == 0, done.stderr
    made.append(json.loads(done.stdout)['rows'])
  assert made[0] == made[1] != made[2]


@pytest.mark.parametrize('command, flags, sentence', [
  ('add-expert', [], '--from is required.'),
  ('drop-expert', [], '--expert is required.'),
  ('drop-expert', ['--expert=law', '--from=hub'], '--from has no effect on drop-expert: remove it'),
  ('replace-expert', ['--expert=0', '--from=hub', '--seed=1'], '--seed has no effect on replace-'),
  ('drop-expert', ['--expert=math'], "bam has no expert 'math'. Its experts are 0: seed, 1: code"),
])  # fmt: skip
def test_mistakes_are_one_sentence(server, world, command, flags, sentence):
  line = f'convert {command}', '--checkpoint=bam', '--output=x', *flags
  server.run(*line, folder=world).check().refused(sentence)
  assert not (world / 'x').exists()
