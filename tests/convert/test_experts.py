"""`convert add-expert`, `drop-expert` and `replace-expert` as their users run them."""

import json

import numpy as np
import pytest

from bam_jax import checkpoint
from tests.hf import folders


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """A mixture of three, and a folder of transformers."""
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
  """With a folder of transformers as the new expert."""
  flags = '--checkpoint=bam', '--from=hub', '--output=more', '--router_init=zero'
  facts = run(server, world, 'add-expert', *flags)
  assert facts['output'] == 'more' and facts['seconds'] > 0
  new = facts['meta']['manifest']['sources'][1]['run']
  assert facts['meta']['sources'] == ['seed', 'code', 'law', new]
  run(server, world, 'drop-expert', '--checkpoint=more', '--expert=3', '--output=back')
  before, after = (folders.read_checkpoint(world / name) for name in ('bam', 'back'))
  for path, array in after.items():
    np.testing.assert_array_equal(array, before[path], err_msg=path, strict=True)
  flags = '--checkpoint=bam', '--from=hub', '--expert=code', '--output=other'
  facts = run(server, world, 'replace-expert', *flags)
  assert facts['meta']['manifest']['grown']['experts'] == [0, -1, 2]
  more, other = (folders.read_checkpoint(world / name) for name in ('more', 'other'))
  for path in ('blocks/ffn/up', 'blocks/attention/key'):
    np.testing.assert_array_equal(other[path][:, 1], more[path][:, 3])
  assert checkpoint.read_meta(world / 'other').manifest.command.endswith('--json=-')
  shown = server.run('convert inspect', 'other', folder=world).check().stderr
  assert 'experts 0 -1 2 of seed code law; -1: a new one' in shown


@pytest.mark.slow
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
  ('drop-expert', ['--expert=law', '--from=hub'], '--from has no effect on drop-expert: remove it'),
  ('drop-expert', ['--expert=math'], "bam has no expert 'math'. Its experts are 0: seed, 1: code"),
])  # fmt: skip
def test_mistakes_are_one_sentence(server, world, command, flags, sentence):
  line = f'convert {command}', '--checkpoint=bam', '--output=x', *flags
  server.run(*line, folder=world).check().refused(sentence)
  assert not (world / 'x').exists()
