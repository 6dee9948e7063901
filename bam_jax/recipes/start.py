"""The parameters that a run starts from: random, another run's, a checkpoint's, or a mixture's."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bam_jax import checkpoint, config
from bam_jax.checkpoint import integrity
from bam_jax.data import shards
from bam_jax.files import folders
from bam_jax.model import parameters, transformer
from bam_jax.parallel import processes, sharding
from bam_jax.recipes import graph
from bam_jax.train import loop
from bam_jax.upcycle import centroids, merge, outputs, rules
from bam_jax.upcycle import sources as sources_lib


def initial_params(
  recipe: config.Recipe,
  nodes: Mapping[str, graph.Node],
  node: graph.Node,
  workdir: Path,
  dataset: shards.Dataset,
  shardings: Any,
) -> transformer.Params:
  """The parameters that a run starts from, laid out by `shardings`; all processes must call."""
  abstract = transformer.Network(node.model, node.run.compute).abstract()
  key = merge.run_key(recipe.seed, node.name)
  match node.run.init:
    case 'scratch':
      init = transformer.Network(node.model, node.run.compute).init
      return jax.jit(init, out_shardings=shardings)(key)
    case config.FromRun(parent):
      return checkpoint.restore_params(
        _find(workdir / parent), checkpoint.abstract(abstract, shardings)
      )
    case config.FromCheckpoint(path):
      return checkpoint.restore_params(_find(path), checkpoint.abstract(abstract, shardings))
    case config.FromUpcycle(upcycle):
      paths = [_find(workdir / name) for name in upcycle.sources]
      for path in paths:
        integrity.check_together(path, ['params'])
      sources = sources_lib.open_sources([str(path) for path in paths])
      processes.decide(functools.partial(sources_lib.check_different, sources))
      routers = None
      if upcycle.router_init == 'centroids':
        runs = [nodes[name].run for name in upcycle.sources]
        routers = _centroids(recipe, node, runs, dataset, sources, key)
      return outputs.to_mesh(sources, abstract, shardings, upcycle, key, routers)
  raise AssertionError(node.run.init)


def _find(path: Path | str) -> Path:
  return folders.at(processes.decide(lambda: str(checkpoint.find(path))))


def _centroids(
  recipe: config.Recipe,
  node: graph.Node,
  runs: Sequence[config.Run],
  dataset: shards.Dataset,
  sources: Sequence[sources_lib.Source],
  key: jax.Array,
) -> dict[str, np.ndarray]:
  """A mixture's routers, from the first batches that each of its sources was trained on."""
  upcycle, mesh = node.upcycle, sharding.make_mesh(node.run.mesh)
  rows = node.run.batch_size // node.run.grad_accum_steps
  count = math.ceil(centroids.CENTROID_TOKENS / (rows * recipe.data.sequence_length))
  batches = []
  for run in runs:
    # In the mixture's micro-batches, which its mesh can hold.
    run = dataclasses.replace(run, batch_size=rows, grad_accum_steps=1, mesh=node.run.mesh)
    read = loop.batches_of(run, recipe, dataset)
    batches.append(map(read.__getitem__, range(count)))

  # The dense average is whole on every device for a moment, in the dtype that it computes in.
  network = transformer.Network(sources[0].meta.model, node.run.compute)
  cast = functools.partial(parameters.cast, dtype=np.dtype(node.run.compute.dtype))
  abstract = jax.eval_shape(cast, network.abstract())
  everywhere = jax.tree.map(lambda _: NamedSharding(mesh, P()), abstract)
  soup = config.Upcycle(
    upcycle.sources, 'average', average=upcycle.average, weights=upcycle.weights
  )
  params = outputs.to_mesh(sources, abstract, everywhere, soup, key)
  means_SLD = centroids.mean_inputs(network, params, batches, mesh)
  paths = [rule.target for rule in rules.rules(node.model) if rule.how == 'router']
  return {path: centroids.columns(means_SLD, path, upcycle, key) for path in paths}
