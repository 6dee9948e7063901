"""What a run holds while it starts: its devices' shards, and about one more array.

Eight fake devices share the memory of one process, which must be a new one: a peak never falls.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from bam_jax import config
from bam_jax.data import store
from bam_jax.parallel import sharding
from bam_jax.recipes import graph, start
from bam_jax.upcycle import outputs, routers
from tests import conftest
from tests.upcycle import memory

MODEL = conftest.SIZES | dict(
  d_model=512, num_layers=32, num_heads=8, num_kv_heads=4, head_dim=64, ffn_dim=1408
)
# Beside arrays: regions read ahead, readers' caches, programs and their compilation. Less than a
# dense model, of 378 MB, which nothing may hold whole beside the shards of the mixture.
SLACK = 320e6
# What is freed goes back to the system at once: the peak is of what is held, not of what was.
ALLOCATOR = {'MALLOC_MMAP_THRESHOLD_': '1000000', 'MALLOC_TRIM_THRESHOLD_': '1000000'}


def nodes(folder: Path) -> tuple[config.Recipe, dict[str, graph.Node]]:
  """A mixture of three dense models that starts in every way which reads checkpoints."""
  made = copy.deepcopy(conftest._RECIPE) | {'model': MODEL}
  runs = made['runs']
  runs['bam']['mesh'] = {'fsdp': 8}
  upcycle = runs['bam']['init']['upcycle']
  for name, init in {
    'fitted': {'upcycle': upcycle | dict(router_init='centroids', router_input='prefix')},
    'continued': {'checkpoint': str(folder / 'bam')},
    'grown': {'grow': {'from': 'bam', 'with': 'law'}},
  }.items():
    runs[name] = runs['bam'] | {'init': init}
  recipe = config.parse(made)
  return recipe, graph.resolve(recipe)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
  """The dense models, and the mixture of them."""
  folder, model = tmp_path_factory.mktemp('start'), config.Model(**MODEL)
  for number, name in enumerate(('seed', 'code', 'law')):
    memory.save(folder / name, memory.draw(model, number), model)
  experts = config.AttentionExperts(3), config.FFNExperts(3)
  mixture = config.Model(**MODEL, attention_experts=experts[0], ffn_experts=experts[1])
  memory.save(folder / 'bam', memory.draw(mixture, 3), mixture, sources=('seed', 'code', 'law'))
  return folder


@pytest.mark.slow
@pytest.mark.parametrize('name', ['bam', 'fitted', 'continued', 'grown'])
def test_a_start_holds_its_shards_and_one_array(folder, dataset, name):
  command = [sys.executable, '-m', __name__, str(folder), str(dataset.path), name]
  root = Path(conftest.__file__).parents[1]
  variables = os.environ | ALLOCATOR | {'JAX_NUM_CPU_DEVICES': '8'}
  done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True)
  assert not done.returncode, done.stderr
  took, shards, largest = json.loads(done.stdout)
  assert shards < took < shards + largest + SLACK


def main(folder: str, dataset: str, name: str) -> None:
  """Lays out a run's first parameters; prints bytes: taken, of all shards, of the largest array."""
  jax.devices()
  routers.FIT_TOKENS = 512
  recipe, made = nodes(Path(folder))
  node = made[name]
  mesh = sharding.make_mesh(node.run.mesh)
  abstract = memory.abstract(node.model)
  arguments = recipe, made, node, Path(folder), store.open_dataset(dataset)
  before = resident('VmRSS')
  with jax.set_mesh(mesh):
    params = start.initial_params(*arguments, sharding.tree(abstract, mesh))
  sizes = [spec.nbytes for spec in outputs.specs(jax.block_until_ready(params)).values()]
  print(json.dumps([resident('VmHWM') - before, sum(sizes), max(sizes)]))


def resident(what: str) -> int:
  """Bytes of this process, now (VmRSS) or at most so far (VmHWM)."""
  status = Path('/proc/self/status').read_text(encoding='ascii')
  return 1024 * int(re.search(rf'{what}:\s*(\d+)', status)[1])


if __name__ == '__main__':
  main(*sys.argv[1:])
