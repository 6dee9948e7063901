"""What the commands are given where nothing is wrong."""

from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.hf import folders


class World:
  """A folder with a recipe, text, a prepared dataset, checkpoints and a model of transformers'."""

  def __init__(self, folder: Path, text: Path, data: Path):
    self.folder, self.text, self.data = folder, text, data
    self.dense = folders.write_checkpoint(
      folder / 'dense', folders.make_model(), folders.draw(folders.make_model())
    )
    other = folders.draw(folders.make_model(), seed=1)
    self.other = folders.write_checkpoint(
      folder / 'other', folders.make_model(), other, run='other'
    )
    mixture = folders.make_model('kv_experts')
    self.mixture = folders.write_checkpoint(folder / 'mixture', mixture, folders.draw(mixture))
    self.hf = folders.write_hf(folder / 'hf', folders.CONFIG, folders.cohere_tensors())
    tensors = list(folders.cohere_tensors().items())
    shards = dict(tensors[:5]), dict(tensors[5:])
    self.hf_shards = folders.write_hf(folder / 'hf_shards', folders.CONFIG, *shards)
    self.recipe = f'{ROOT}/tests/assets/tiny.py:{text}'

  def line(self, command: str, output: Path) -> list[str]:
    """A command line that works; what it makes is at `output`."""
    return {
      'account': [f'--config={self.recipe}'],
      'aot': [f'--config={self.recipe}', '--run=bam_kv_experts', '--topology=v5e:2x2'],
      'convert upcycle': [
        f'--from={self.dense}', f'--from={self.other}', '--method=bam_kv_experts',
        f'--output={output}',
      ],
      'convert mix': [
        f'--from={self.dense}', f'--from={self.other}', f'--output={output}',
        f'--data=code={self.text}/code', f'--data=general={self.text}/general',
        '--router_tokens=100',
      ],
      'convert add-expert': [
        f'--checkpoint={self.mixture}', f'--from={self.other}', f'--output={output}'
      ],
      'convert drop-expert': [
        f'--checkpoint={self.mixture}', '--expert=1', f'--output={output}'
      ],
      'convert replace-expert': [
        f'--checkpoint={self.mixture}', '--expert=1', f'--from={self.other}', f'--output={output}'
      ],
      'convert import-hf': [f'--input={self.hf}', f'--output={output}'],
      'convert export-hf': [f'--checkpoint={self.mixture}', f'--output={output}'],
      'convert inspect': [str(self.dense), str(self.other)],
      'evaluate': [
        f'--checkpoint={self.dense}', f'--data=code={self.text}/code', '--max_documents=3'
      ],
      'generate': [f'--checkpoint={self.dense}', '--prompt=the cat', '--max_new_tokens=2'],
      'main': [
        f'--config={self.recipe}', f'--workdir={output}', '--runs=seed',
        f'--config.data.path={self.data}', '--config.model.vocab_size=320', '--config.steps=1',
      ],
      'prepare': [f'--input={self.text}', f'--output={output}', '--train_tokenizer=300'],
    }[command]  # fmt: skip

  def refused(self, command: str, output: Path) -> list[str]:
    """A command line that is refused in a moment, after its flags are read."""
    nowhere = {
      **{f'convert {what}-expert': '--checkpoint=nowhere' for what in ('add', 'drop', 'replace')},
      'account': '--run=nowhere', 'evaluate': '--checkpoint=nowhere',
      'generate': '--checkpoint=nowhere', 'main': '--runs=nowhere',
    }  # fmt: skip
    if command in ('convert upcycle', 'convert mix'):
      return ['--from=nowhere', '--from=there', '--method=bam_kv_experts', f'--output={output}']
    return [*self.checked(command, output), *filter(None, [nowhere.get(command)])]

  def checked(self, command: str, output: Path) -> list[str]:
    """As `line`, but main is refused when it has checked everything and would begin to train."""
    if command != 'main':
      return self.line(command, output)
    data = f'--config.data.path={self.data}', '--config.model.vocab_size=320'
    return [f'--config={self.recipe}', *data, '--workdir=/dev/null/nowhere', '--runs=seed']


@pytest.fixture(scope='session')
def world(text, dataset, tmp_path_factory) -> World:
  return World(tmp_path_factory.mktemp('world'), text, dataset.path)
