"""What each of 64 hosts holds while a mixture starts: of the recipe's model, and of a 7B model.

    python -m benchmarks.start --config=configs/large_2b.py

For meshes of 256 devices, 4 to a host: what a host's devices keep; what the host reads of the
mixture's arrays to make that; and the largest part of one array, for which its own memory must have
room, beside the regions that are read ahead. The numbers follow from the shapes, by the functions
with which a run starts; `tests/recipes/test_start_memory.py` measures a process.

`--json` writes `rows`: `model`, `run`, `mesh`, `mixture_bytes`, and the most of any host of
`shard_bytes`, `read_bytes` and `array_bytes`.
"""

import collections
import dataclasses
import math
from typing import Any

import jax
from flax import traverse_util

from bam_jax import cli, config
from bam_jax.account import accounting
from bam_jax.model import transformer
from bam_jax.parallel import sharding
from bam_jax.recipes import graph
from bam_jax.upcycle import outputs
from benchmarks.aot_table import SEVEN_B

HOSTS, DEVICES = 64, 4
MESHES = dict(data=2, fsdp=128), dict(data=2, fsdp=32, expert=4), dict(data=4, fsdp=16, expert=4)
RUNS = 'seed', 'btx', 'bam_kv'

_CONFIG = cli.define_recipe()


def main() -> dict[str, Any]:
  """Lays the runs out, and prints a table."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', HOSTS * DEVICES)
  recipe = cli.read_recipe(_CONFIG)
  seven_b = dataclasses.replace(recipe, model=config.Model(**SEVEN_B))
  rows = []
  for name, made in ((recipe.name, recipe), ('7B', seven_b)):
    nodes = graph.resolve(made)
    for run in RUNS:
      for mesh in MESHES:
        what = dict(model=name, run=run, mesh=accounting.mesh_text(mesh))
        rows.append(what | of_hosts(nodes[run], config.Mesh(**mesh)))
  columns = 'mixture_bytes', 'shard_bytes', 'read_bytes', 'array_bytes'
  shown = [
    (row['model'], row['run'], row['mesh'], *(f'{row[key] / 1e9:.2f} GB' for key in columns))
    for row in rows
  ]
  title = f'At most of {HOSTS} hosts of {DEVICES} devices'
  titles = 'mixture', 'kept by its devices', 'read', 'largest part of an array'
  cli.console().print(cli.table(title, ['model', 'run', 'mesh'], titles, shown))
  return {'rows': rows}


def of_hosts(node: graph.Node, mesh: config.Mesh) -> dict[str, int]:
  """Bytes of the mixture, and the most of any host."""
  abstract = transformer.Network(node.model, node.run.compute).abstract()
  made = sharding.make_mesh(mesh)
  shardings = traverse_util.flatten_dict(sharding.tree(abstract, made), sep='/')
  hosts = [collections.Counter() for _ in range(HOSTS)]
  specs = outputs.specs(abstract)
  size = lambda box, spec: math.prod(stop - start for start, stop in box) * spec.dtype.itemsize
  for path, spec in specs.items():
    indices = shardings[path].devices_indices_map(spec.shape)
    ordered = [indices[device] for device in made.devices.flat]
    for number, host in enumerate(hosts):
      mine = ordered[number * DEVICES : (number + 1) * DEVICES]
      part = size(outputs.around(spec, mine), spec)
      host['shard_bytes'] += sum(size(outputs.around(spec, [index]), spec) for index in mine)
      host['read_bytes'] += part
      host['array_bytes'] = max(host['array_bytes'], part)
  most = {key: max(host[key] for host in hosts) for key in hosts[0]}
  return {'mixture_bytes': sum(spec.nbytes for spec in specs.values()), **most}


if __name__ == '__main__':
  cli.run(main)
