"""Every file of every folder that a command reads, damaged in every way; nothing in them is run."""

import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.commands import ROOT


class Trap:
  """Whoever unpickles it makes a file."""

  def __init__(self, marker: Path):
    self.marker = marker

  def __reduce__(self):
    return Path.touch, (self.marker,)


def lines(world, folder: Path, output: Path) -> dict[str, list[tuple[str, list[str]]]]:
  """For each folder that can be damaged, commands that read its copy `folder`."""
  data = f'--config.data.path={folder}', '--config.model.vocab_size=320', '--runs=seed'
  return {
    'data': [
      ('evaluate', [f'--data={folder}', '--checkpoint=nowhere']),
      ('main', [f'--config={world.recipe}', *data, '--workdir=/dev/null/nowhere']),
    ],
    'mixture': [
      ('convert inspect', [str(folder)]),
      ('convert export-hf', [f'--checkpoint={folder}', f'--output={output}']),
      ('generate', [f'--checkpoint={folder}', '--prompt=the cat', '--max_new_tokens=1']),
    ],
    'hf': [('convert import-hf', [f'--input={folder}', f'--output={output}'])],
    'hf_shards': [('convert import-hf', [f'--input={folder}', f'--output={output}'])],
  }  # fmt: skip


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ('hf', 'hf_shards')]


def files_of(folder: Path) -> list[Path]:
  """The files below a folder; of several alike, such as shards, the first."""
  found = {}
  for path in sorted(path for path in folder.rglob('*') if path.is_file()):
    place = path.relative_to(folder)
    found.setdefault((len(place.parts), re.sub('[0-9a-f]{16,}', '', path.name)), place)
  return list(found.values())


def faults(path: Path, marker: Path) -> dict:
  """Ways to damage a file."""
  chance = random.Random(path.name)
  content = path.read_bytes()
  at = chance.randrange(len(content) or 1)

  return {
    'missing': path.unlink,
    'empty': lambda: path.write_bytes(b''),
    'half': lambda: path.write_bytes(content[: len(content) // 2]),
    'flipped': lambda: path.write_bytes(
      content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]
    ),
    'noise': lambda: path.write_bytes(chance.randbytes(len(content))),
    'a pickle': lambda: path.write_bytes(pickle.dumps(Trap(marker))),
    'an array of objects': lambda: np.array([Trap(marker)], object).dump(path),
    'deep': lambda: path.write_text('[' * 100_000 + ']' * 100_000),
    'an absurd size': lambda: os.truncate(path, 2**37),
    'a folder': lambda: (path.unlink(), path.mkdir()),
  }


def each_command(server, world, tmp_path, name: str, few: bool) -> None:
  """Runs what reads the damaged folder `tmp_path/damaged`."""
  output = tmp_path / 'output'
  for command, line in lines(world, tmp_path / 'damaged', output)[name][: 1 if few else None]:
    shutil.rmtree(output, ignore_errors=True)
    server.run(command, *line, folder=tmp_path).check()
  assert not (tmp_path / 'unpickled').exists()


def damage_all(server, world, tmp_path, name: str, few: bool) -> None:
  for relative in files_of(getattr(world, name)):
    kinds = faults(getattr(world, name) / relative, tmp_path)
    for fault in kinds if few else ('missing', 'flipped', 'a pickle'):
      folder = tmp_path / 'damaged'
      shutil.rmtree(folder, ignore_errors=True)
      shutil.copytree(getattr(world, name), folder)
      # What checksums would notice must be noticed without them too.
      shutil.rmtree(folder / 'checksums', ignore_errors=relative.parts[0] != 'checksums')
      if not (folder / relative).exists():
        shutil.copytree(getattr(world, name) / 'checksums', folder / 'checksums')
      faults(folder / relative, tmp_path / 'unpickled')[fault]()
      each_command(server, world, tmp_path, name, few)


@pytest.mark.parametrize('name', ['data', *SLOW])
def test_a_damaged_file(server, world, tmp_path, name):
  damage_all(server, world, tmp_path, name, few=True)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['data', 'mixture'])
def test_a_damaged_file_and_every_command(server, world, tmp_path, name):
  damage_all(server, world, tmp_path, name, few=False)


def changed(facts, path: tuple, value):
  """A copy with something else at a path."""
  if not path:
    return value
  copy = dict(facts) if isinstance(facts, dict) else list(facts)
  copy[path[0]] = changed(copy[path[0]], path[1:], value)
  return copy


@pytest.mark.parametrize('outside', ['../../etc/passwd', '/etc/passwd', 'code/../../x'])
def test_no_manifest_leads_out_of_its_folder(server, world, tmp_path, outside):
  """Names in them are plain; a link that lies there is the user's own, and is followed."""
  data = shutil.copytree(world.data, tmp_path / 'data')
  manifest = json.loads((data / 'manifest.json').read_text())
  for facts in (
    changed(manifest, ('tokenizer', 'file'), outside),
    changed(manifest, ('domains', 'code'), {outside: manifest['domains']['code']['train']}),
    {**manifest, 'domains': {outside: manifest['domains']['code']}},
  ):
    (data / 'manifest.json').write_text(json.dumps(facts))
    outcome = server.run('evaluate', f'--data={data}', f'--checkpoint={world.dense}')
    assert outcome.check('manifest.json').status == 2
  hf = shutil.copytree(world.hf_shards, tmp_path / 'hf')
  index = hf / 'model.safetensors.index.json'
  facts = json.loads(index.read_text())
  name = ('weight_map', next(iter(facts['weight_map'])))
  index.write_text(json.dumps(changed(facts, name, f'{outside}.safetensors')))
  outcome = server.run('convert import-hf', f'--input={hf}', f'--output={tmp_path}/output')
  assert outcome.check('model.safetensors.index.json').status == 2
  sums = shutil.copytree(world.dense, tmp_path / 'dense') / 'checksums' / 'crc32.json'
  listed = json.loads(sums.read_text())
  sums.write_text(json.dumps(listed | {f'params/{outside}': [0, 0]}))
  assert server.run('convert inspect', str(tmp_path / 'dense')).check().status == 2


def test_a_newer_format(server, world, tmp_path):
  dense = shutil.copytree(world.dense, tmp_path / 'dense')
  shutil.rmtree(dense / 'checksums')
  data = shutil.copytree(world.data, tmp_path / 'data')
  for file in (dense / 'meta' / 'metadata', data / 'manifest.json'):
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {'format': facts['format'] + 1, 'unheard_of': 1}))
  for command, line in [
    ('convert inspect', [str(dense)]),
    ('convert upcycle', [f'--from={dense}', f'--from={world.other}', '--method=btx', '--output=o']),
    ('generate', [f'--checkpoint={dense}', '--prompt=x']),
    ('evaluate', [f'--checkpoint={world.dense}', f'--data={data}']),
    ('main', [f'--config={world.recipe}', f'--config.data.path={data}', '--workdir=w']),
  ]:
    outcome = server.run(command, *line, folder=tmp_path).check('upgrade bam_jax')
    assert outcome.status == 2 and 'format ' in outcome.sentence


def test_no_module_reads_pickles():
  package = ROOT / 'bam_jax'
  found = [
    path.relative_to(package).as_posix()
    for path in sorted(package.rglob('*.py'))
    if re.search(
      r'pickle\.load|allow_pickle=True|\beval\(|\bexec\(|torch\.load|marshal', path.read_text()
    )
  ]
  assert not found
