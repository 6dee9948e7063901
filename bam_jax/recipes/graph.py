"""The graph of a recipe's runs, resolved and checked whole before anything is computed."""

import graphlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bam_jax import checkpoint, config
from bam_jax.data import shards
from bam_jax.errors import UserError
from bam_jax.model import arithmetic, transformer
from bam_jax.model.kernels import attention
from bam_jax.parallel import memory, sharding
from bam_jax.train import stages
from bam_jax.upcycle import rules

# What may change between two attempts at one run: none of it changes the parameters, but for what
# `guard` skips, which a run that it halted at a bad step shall be free to say.
INCIDENTAL = ('label', 'mesh', 'intervals', 'guard', 'watch')


@dataclass(frozen=True)
class Node:
  """One run, resolved: its model is known, and what its identity is."""

  name: str
  run: config.Run
  model: config.Model
  identity: dict[str, Any]  # equal for two attempts that end in the same parameters

  @property
  def upcycle(self) -> config.Upcycle | None:
    return self.run.init.upcycle if isinstance(self.run.init, config.FromUpcycle) else None

  @property
  def kind(self) -> str:
    if self.upcycle:
      return 'mixture'
    return 'specialist' if isinstance(self.run.init, config.FromRun) else 'seed'


def resolve(recipe: config.Recipe, data_hash: str = '') -> dict[str, Node]:
  """The runs in an order in which every run comes after those that it starts from.

  Raises:
    UserError: a cycle, a mixture of mixtures, or sources that differ in their model.
  """
  graph = {name: config.parents(run) for name, run in recipe.runs.items()}
  try:
    order = list(graphlib.TopologicalSorter(graph).static_order())
  except graphlib.CycleError as error:
    raise UserError(f'config.runs has a cycle: {" <- ".join(error.args[1])}.') from None
  # Among the orders that the graph allows, the one closest to how the recipe is written.
  depth: dict[str, int] = {}
  for name in order:
    depth[name] = 1 + max((depth[parent] for parent in graph[name]), default=0)
  written = list(recipe.runs)
  order = sorted(order, key=lambda name: (depth[name], written.index(name)))

  nodes: dict[str, Node] = {}
  for name in order:
    run = recipe.runs[name]
    model = _model(recipe, name, nodes)
    stages.check(run, model, f'config.runs.{name}')
    kept = {k: v for k, v in config.to_dict(run).items() if k not in INCIDENTAL}
    identity = {
      'model': config.to_dict(model),
      'total_steps': recipe.total_steps(name),
      'warmup_steps': recipe.warmup_steps(name),
      'sequence_length': recipe.data.sequence_length,
      'seed': recipe.seed,
      'data_hash': data_hash,
      'sources': {parent: digest(nodes[parent].identity) for parent in graph[name]},
      **kept,
    }
    nodes[name] = Node(name, run, model, identity)
  return nodes


def digest(identity: dict[str, Any]) -> str:
  """A short hash of JSON-ready facts."""
  return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def check(
  recipe: config.Recipe, nodes: dict[str, Node], dataset: shards.Dataset, asked: Sequence[str]
) -> tuple[str, ...]:
  """UserError for whatever the data, the devices or the mesh cannot give; the tables' domains."""
  vocabulary = dataset.manifest['tokenizer']['vocab_size']
  domains = recipe.evaluation.domains or dataset.domains
  for domain in domains:
    if 'valid' not in dataset.splits(domain):
      raise UserError(f'{dataset.path} has no held-out documents of the domain {domain!r}.')
  for name in asked:
    node = nodes[name]
    if node.model.vocab_size < vocabulary:
      raise UserError(
        f'config.model.vocab_size={node.model.vocab_size} is below the {vocabulary} tokens of the '
        f'tokenizer in {dataset.path}: raise it to {vocabulary}.'
      )
    _check_tokenizer(node, dataset)
    for reader, domain in _reads(node, nodes):
      if domain not in dataset.domains:
        raise UserError(
          f'config.runs.{reader}.data names the domain {domain!r}; {dataset.path} has '
          f'{", ".join(dataset.domains)}.'
        )
      if 'train' not in dataset.splits(domain):
        raise UserError(
          f'config.runs.{name}.data names the domain {domain!r}, of which {dataset.path} has no '
          'train split.'
        )
    if node.run.mesh.size > jax.device_count():
      raise UserError(
        f'config.runs.{name}.mesh needs {node.run.mesh.size} devices and there are '
        f'{jax.device_count()}: make its axes smaller.'
      )
    if recipe.evaluation.batch_size % node.run.mesh.batch_shards:
      raise UserError(
        f'config.evaluation.batch_size={recipe.evaluation.batch_size} is not a multiple of the '
        f'{node.run.mesh.batch_shards} parts that config.runs.{name}.mesh cuts a batch into.'
      )
    attention.check(node.model, recipe.data.sequence_length, jax.default_backend())
    abstract = transformer.Network(node.model, node.run.compute).abstract()
    sharding.check(abstract, node.run.mesh, f'config.runs.{name}')
    _check_room(node, recipe)
  return domains


def _check_room(node: Node, recipe: config.Recipe) -> None:
  """UserError when the devices cannot hold a run: its state, and the least of its activations."""
  run, model, name = node.run, node.model, f'config.runs.{node.name}'
  # Every fake device of a CPU has its part in the one memory.
  parts = config.Mesh() if jax.default_backend() == 'cpu' else run.mesh
  copies = 2 if run.compute.offload_optimizer else 4  # gradients; two moments of AdamW
  state = copies * 4 * arithmetic.parameters(model).total // parts.size
  free = memory.free_bytes()
  if free is None:
    return
  if state > free:
    raise UserError(
      f'{name} needs {state / 1e9:,.1f} GB of a device for parameters, gradients and optimizer, '
      f'and {free / 1e9:,.1f} GB are free: make model smaller or mesh larger.'
    )
  # Gradients come while activations go: only one of the two is whole at any time.
  kept, itemsize = state * (copies - 1) // copies, jnp.dtype(run.compute.dtype).itemsize
  for key, batch_size, grad_accum_steps, layers in (
    (f'{name}.batch_size', run.batch_size, run.grad_accum_steps, model.num_layers),
    ('config.evaluation.batch_size', recipe.evaluation.batch_size, 1, 1),
  ):
    tokens = batch_size // grad_accum_steps * recipe.data.sequence_length // parts.batch_shards
    logits = min(tokens, run.compute.loss_chunk or tokens) * model.vocab_size // parts.tensor
    # Whatever is done again in the backward pass, each block's input is kept for it.
    needed = kept + layers * tokens * model.d_model * itemsize + 4 * logits
    if needed > free:
      raise UserError(
        f'{key}={batch_size} needs at least {needed / 1e9:,.1f} GB of a device, for blocks, logits '
        f'and the state of {name}, and {free / 1e9:,.1f} GB are free: make it smaller, or cut it '
        f'with {name}.grad_accum_steps (training alone) or its compute.loss_chunk.'
      )


def _check_tokenizer(node: Node, dataset: shards.Dataset) -> None:
  """UserError when a checkpoint's parameters know other words than the data has."""
  if not isinstance(node.run.init, config.FromCheckpoint):
    return
  path = node.run.init.checkpoint
  if checkpoint.read_meta(path).tokenizer_hash != dataset.tokenizer_hash:
    raise UserError(
      f'config.runs.{node.name}.init.checkpoint={path} was made with another tokenizer than '
      f'{dataset.path}: prepare the data with the tokenizer that lies with the checkpoint.'
    )


def _reads(node: Node, nodes: dict[str, Node]) -> list[tuple[str, str]]:
  """(run, domain) of all the training data that a run reads."""
  readers = [node.name]
  if node.upcycle and node.upcycle.router_init == 'centroids':
    readers += node.upcycle.sources
  return [(reader, domain) for reader in readers for domain in nodes[reader].run.data]


def _check_centroids(recipe: config.Recipe, name: str, upcycle: config.Upcycle) -> None:
  """UserError when routers are to tell apart two sources that were trained on the same data."""
  seen: dict[tuple, str] = {}
  for source in upcycle.sources if upcycle.router_init == 'centroids' else ():
    data = recipe.runs[source].data
    total = sum(data.values())
    shares = tuple(sorted((domain, round(share / total, 6)) for domain, share in data.items()))
    if shares in seen:
      raise UserError(
        f"config.runs.{name}.init.upcycle.router_init='centroids' cannot tell {seen[shares]!r} "
        f"from {source!r}, which have the same data: set router_init='random'."
      )
    seen[shares] = source


def _model(recipe: config.Recipe, name: str, nodes: dict[str, Node]) -> config.Model:
  match recipe.runs[name].init:
    case 'scratch':
      return recipe.model
    case config.FromCheckpoint(path):
      return checkpoint.read_meta(path).model
    case config.FromRun(parent):
      return nodes[parent].model
    case config.FromUpcycle(upcycle):
      first = upcycle.sources[0]
      for source in upcycle.sources:
        if nodes[source].model != nodes[source].model.dense():
          raise UserError(
            f'config.runs.{name}.init.upcycle.from names {source!r}, which is a mixture: only '
            'dense models can be mixed.'
          )
        if nodes[source].model != nodes[first].model:
          raise UserError(
            f'config.runs.{name}.init.upcycle.from mixes {first!r} and {source!r}, whose models '
            'differ.'
          )
      _check_centroids(recipe, name, upcycle)
      try:
        return rules.mixture_model(nodes[first].model, upcycle)
      except UserError as error:
        raise UserError(f'config.runs.{name}.init.upcycle: {error}') from None
  raise AssertionError(recipe.runs[name].init)
