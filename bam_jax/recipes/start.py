"""The parameters that a run starts from: random, or of a run, a checkpoint or a mixture."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bam_jax import checkpoint, config
from bam_jax.checkpoint import integrity
from bam_jax.data import store
from bam_jax.files import folders
from bam_jax.model import transformer
from bam_jax.parallel import processes, sharding
from bam_jax.recipes import graph
from bam_jax.train import loop
from bam_jax.upcycle import growth, outputs, routers, sources
from bam_jax.upcycle.merge import Merge, run_key


def initial_params(
  recipe: config.Recipe,
  nodes: Mapping[str, graph.Node],
  node: graph.Node,
  workdir: Path,
  dataset: store.Dataset,
  shardings: Any,
) -> transformer.Params:
  """The parameters that a run starts from, laid out by `shardings`; all processes must call."""
  network, key = transformer.Network(node.model, node.run.compute), run_key(recipe.seed, node.name)
  abstract = network.abstract()
  match node.run.init:
    case 'scratch':
      return jax.jit(network.init, out_shardings=shardings)(key)
    case config.FromUpcycle(upcycle):
      opened = _open(workdir / name for name in upcycle.sources)
      sources.check_alike(opened, upcycle.method)
      merge = Merge(opened, upcycle, key)
      processes.decide(functools.partial(sources.check_different, merge.sources))
      if upcycle.fits_routers:
        merge = merge._replace(routers=_routers(recipe, nodes, node, dataset, merge))
      return outputs.to_mesh(merge, abstract, shardings)
    case config.FromGrow(grow):
      mixture, dense = _open([workdir / grow.mixture, workdir / grow.dense])
      grown = growth.add(mixture, dense, key, grow.router_init)
      processes.decide(functools.partial(growth.check_new, mixture, grown))
      return outputs.read_to_mesh(grown.reader, abstract, shardings)
    case config.FromRun(parent):
      path = workdir / parent
    case config.FromCheckpoint():
      path = node.origin.folder
  return checkpoint.restore_params(_find(path), sharding.abstract(abstract, shardings))


def _find(path: Path | str) -> Path:
  return folders.at(processes.decide(lambda: str(checkpoint.find(path))))


def _open(paths: Iterable[Path]) -> list[sources.Source]:
  """The newest checkpoints of runs, checked to be whole."""
  found = [_find(path) for path in paths]
  for path in found:
    processes.decide(functools.partial(integrity.check, path, ['params']))
  return [sources.open_checkpoint(str(path)) for path in found]


def _routers(recipe, nodes, node: graph.Node, dataset, merge: Merge) -> dict[str, np.ndarray]:
  """A mixture's routers, from the first training batches of each source."""
  run, upcycle, mesh = node.run, merge.upcycle, sharding.make_mesh(node.run.mesh)
  rows = run.batch_size // run.grad_accum_steps  # of a micro-batch, which the mesh can hold
  count = math.ceil(routers.FIT_TOKENS / (rows * recipe.data.sequence_length))
  batches = []
  for name in upcycle.sources:
    changes = dict(batch_size=rows, grad_accum_steps=1, mesh=run.mesh)
    read = loop.batches_of(dataclasses.replace(nodes[name].run, **changes), recipe, dataset)
    batches.append([read[number] for number in range(count)])
  return routers.fit(merge, node.model, batches, mesh, run.compute)
