"""The graph of a recipe's runs, resolved and checked completely before anything is computed."""

import graphlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from bam_jax import checkpoint, config
from bam_jax.checkpoint import integrity
from bam_jax.config.strict import require
from bam_jax.data import store
from bam_jax.errors import UserError
from bam_jax.model import arithmetic, transformer
from bam_jax.model.kernels import attention
from bam_jax.parallel import memory, processes, sharding
from bam_jax.train import optimizer
from bam_jax.upcycle import growth, rules

# What may change between two attempts at one run: none of it affects the parameters beyond the
# order of sums, except `guard`, which must be changeable after it halted a run at a bad step.
INCIDENTAL = ('label', 'mesh', 'grad_accum_steps', 'compute', 'intervals', 'guard', 'watch')


class Origin(NamedTuple):
  """The checkpoint that a run starts from: the same step from the first check on."""

  folder: epath.Path
  meta: checkpoint.Meta


@dataclass(frozen=True)
class Node:
  """One run, resolved: with its model and its identity."""

  name: str
  run: config.Run
  model: config.Model
  identity: dict[str, Any]  # equal for two attempts that end in the same parameters
  method: str | None  # of the mixture that it is or starts from
  experts: tuple[str, ...]  # the name of each expert's source; empty if unknown
  origin: Origin | None = None  # for `init={'checkpoint': ...}`

  @property
  def upcycle(self) -> config.Upcycle | None:
    """How it is made from other runs, if it is."""
    return self.run.init.upcycle if isinstance(self.run.init, config.FromUpcycle) else None

  @property
  def kind(self) -> str:
    """'mixture', 'specialist' or 'seed'; a run that starts from a mixture is one."""
    if self.upcycle or self.model != self.model.dense():
      return 'mixture'
    return 'specialist' if isinstance(self.run.init, config.FromRun) else 'seed'


def resolve(recipe: config.Recipe, data_hash: str = '') -> dict[str, Node]:
  """The runs in an order in which every run follows those that it starts from.

  UserError for a cycle, a mixture of mixtures, or sources with different models.
  """
  parents = {name: config.parents(run) for name, run in recipe.runs.items()}
  depth: dict[str, int] = {}
  try:
    for name in graphlib.TopologicalSorter(parents).static_order():
      depth[name] = 1 + max((depth[parent] for parent in parents[name]), default=0)
  except graphlib.CycleError as error:
    raise UserError(f'config.runs has a cycle: {" <- ".join(error.args[1])}.') from None
  nodes: dict[str, Node] = {}
  # Among the orders that the graph allows, the one closest to the recipe's.
  for name in sorted(recipe.runs, key=depth.__getitem__):
    run, origin = recipe.runs[name], None
    if isinstance(run.init, config.FromCheckpoint):
      folder = checkpoint.find(run.init.checkpoint)
      origin = Origin(folder, checkpoint.read_meta(folder))
    model, method, experts = _model(recipe, name, nodes, origin)
    optimizer.check(run, model, f'config.runs.{name}')
    identity = {
      'model': config.to_dict(model),
      'total_steps': recipe.total_steps(name),
      'warmup_steps': recipe.warmup_steps(name),
      'sequence_length': recipe.data.sequence_length,
      'seed': recipe.seed,
      'data_hash': data_hash,
      'sources': {parent: digest(nodes[parent].identity) for parent in parents[name]},
      **{key: value for key, value in config.to_dict(run).items() if key not in INCIDENTAL},
    }
    identity['dtype'] = run.compute.dtype
    if _depends_on_micro_batches(run, model):
      identity['grad_accum_steps'] = run.grad_accum_steps
    if origin:  # identified by content, not by path
      folder, meta = origin
      names = sorted(path.name for path in folder.glob('params/d/*'))  # random ones, of new files
      content = digest([config.to_dict(meta), integrity.read(folder, ['params']) or names])
      identity['init'] = {'checkpoint': dict(run=meta.run, step=meta.step, hash=content)}
    nodes[name] = Node(name, run, model, identity, method, experts, origin)
  return nodes


def _depends_on_micro_batches(run: config.Run, model: config.Model) -> bool:
  balances = run.loss.load_balance and run.loss.balance_over == 'micro_batch'
  fits = isinstance(run.init, config.FromUpcycle) and run.init.upcycle.fits_routers
  ffn = model.ffn_experts
  return bool(ffn and (balances or ffn.capacity_factor or fits))


def digest(facts: Any) -> str:
  """A short hash of JSON-ready facts."""
  return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _model(
  recipe: config.Recipe, name: str, nodes: Mapping[str, Node], origin: Origin | None
) -> tuple[config.Model, str | None, tuple[str, ...]]:
  """A run's model, and the method and experts of the mixture that it is or starts from."""
  match recipe.runs[name].init:
    case 'scratch':
      return recipe.model, None, ()
    case config.FromCheckpoint():
      model, method, experts = origin.meta.model, origin.meta.method, origin.meta.sources
    case config.FromRun(parent):
      model, method, experts = nodes[parent].model, nodes[parent].method, nodes[parent].experts
    case config.FromUpcycle(upcycle):
      model = _mixture(recipe, name, upcycle, nodes)
      return model, upcycle.method, rules.expert_names(upcycle, upcycle.sources)
    case config.FromGrow(grow):
      mixture, dense = nodes[grow.mixture], nodes[grow.dense].model
      where = f'config.runs.{name}.init.grow'
      names = growth.names_of(mixture.model, mixture.experts, f'{where}.from={grow.mixture!r}')
      wrong = f'{where}.with={grow.dense!r} is not a dense run of the model that'
      fits = dense == mixture.model.dense()
      require(fits, f'{wrong} {grow.mixture!r} is made of: branch one from the same seed.')
      model = growth.resized(mixture.model, (*range(len(names)), growth.NEW), dense)
      return model, mixture.method, (*names, grow.dense)
  return (model, method, experts) if model != model.dense() else (model, None, ())


def _mixture(recipe, name, upcycle: config.Upcycle, nodes) -> config.Model:
  where, first, seen = f'config.runs.{name}.init.upcycle', upcycle.sources[0], {}
  for source in upcycle.sources:
    model, data = nodes[source].model, recipe.runs[source].data
    wrong = f'{where}.from names {source!r}, which is a mixture: only dense models can be mixed.'
    require(model == model.dense(), wrong)
    wrong = f'{where}.from mixes {first!r} and {source!r}, whose models differ.'
    require(model == nodes[first].model, wrong)
    shares = sorted((domain, round(x / sum(data.values()), 6)) for domain, x in data.items())
    other = seen.setdefault(tuple(shares), source)
    wrong = f'{where}.router_init={upcycle.router_init!r} cannot distinguish {other!r} from'
    fix = f"{source!r}, which have the same data: set router_init='random'."
    require(not upcycle.fits_routers or other == source, f'{wrong} {fix}')
  try:
    return rules.mixture_model(nodes[first].model, upcycle)
  except UserError as error:
    raise UserError(f'{where}: {error}') from None


def check(
  recipe: config.Recipe, nodes: Mapping[str, Node], dataset: store.Dataset, asked: Sequence[str]
) -> tuple[str, ...]:
  """The domains to evaluate; UserError if the data, the devices or the mesh do not suffice."""
  domains, batch_size = recipe.evaluation.domains or dataset.domains, recipe.evaluation.batch_size
  for domain in domains:
    wrong = f'{dataset.path} has no held-out documents of the domain {domain!r}.'
    require('valid' in dataset.splits(domain), wrong)
  for name in asked:
    node, mesh, where = nodes[name], nodes[name].run.mesh, f'config.runs.{name}'
    _check_data(node, nodes, dataset)
    wrong = f'{where}.mesh requires {mesh.size} devices, but there are {jax.device_count()}'
    require(mesh.size <= jax.device_count(), f'{wrong}: make its axes smaller.')
    parts = f'the {mesh.batch_shards} parts that {where}.mesh splits a batch into'
    wrong = f'config.evaluation.{batch_size=} is not a multiple of {parts}.'
    require(batch_size % mesh.batch_shards == 0, wrong)
    attention.check(node.model, recipe.data.sequence_length, jax.default_backend())
    fits = node.upcycle and node.upcycle.fits_routers
    # Which need the dense average on the mixture's mesh.
    for model in (node.model, *((node.model.dense(),) if fits else ())):
      sharding.check(transformer.Network(model, node.run.compute).abstract(), mesh, where)
    processes.check_mesh(mesh, where)
    _check_memory(node, recipe)
  return tuple(domains)


def _check_data(node: Node, nodes: Mapping[str, Node], dataset: store.Dataset) -> None:
  vocab_size, tokens = node.model.vocab_size, dataset.vocab_size
  wrong = f'config.model.{vocab_size=} is below the {tokens} tokens of the tokenizer in'
  require(vocab_size >= tokens, f'{wrong} {dataset.path}: raise it to {tokens}.')
  if isinstance(node.run.init, config.FromCheckpoint):
    path = node.run.init.checkpoint
    wrong = f'config.runs.{node.name}.init.checkpoint={path} was made with another tokenizer than'
    fix = 'prepare the data with the tokenizer stored with the checkpoint'
    (folder, meta), facts = node.origin, dataset.manifest['tokenizer']
    if meta.words != (facts['hash'], facts['bos_token'], facts['eos_token']):
      found = checkpoint.open_tokenizer(folder, meta).difference(dataset.tokenizer())
      require(not found, f'{wrong} {dataset.path} ({found}): {fix}.')
  fits = node.upcycle and node.upcycle.fits_routers
  for reader in (node.name, *(node.upcycle.sources if fits else ())):
    for domain in nodes[reader].run.data:
      names, has = f'config.runs.{reader}.data names the domain {domain!r}', dataset.domains
      require(domain in has, f'{names}; {dataset.path} has {", ".join(has)}.')
      wrong = f'{names}, which has no train split in {dataset.path}.'
      require('train' in dataset.splits(domain), wrong)


def _check_memory(node: Node, recipe: config.Recipe) -> None:
  """UserError if the devices cannot hold a run's state and the minimum of its activations."""
  free = memory.free_bytes()
  if free is None:
    return
  run, model, name = node.run, node.model, f'config.runs.{node.name}'
  # The fake devices of a CPU share its memory.
  parts = config.Mesh() if jax.default_backend() == 'cpu' else run.mesh
  # Of float32: parameters, gradients, two moments of AdamW.
  state = 4 * 4 * arithmetic.parameters(model).total // parts.size
  has = f'{free / 1e9:,.1f} GB are free: make'
  needs = f'needs {state / 1e9:,.1f} GB a device for parameters, gradients and optimizer'
  require(state <= free, f'{name} {needs}, and {has} model smaller or mesh larger.')
  # Gradients appear as activations are freed: only one of the two is complete at any time.
  kept, itemsize = state * 3 // 4, jnp.dtype(run.compute.dtype).itemsize
  for key, batch_size, grad_accum_steps, layers in (
    (f'{name}.batch_size', run.batch_size, run.grad_accum_steps, model.num_layers),
    ('config.evaluation.batch_size', recipe.evaluation.batch_size, 1, 1),
  ):
    tokens = batch_size // grad_accum_steps * recipe.data.sequence_length // parts.batch_shards
    logits = min(tokens, run.compute.loss_chunk or tokens) * model.vocab_size // parts.tensor
    # Whatever is recomputed in the backward pass, each block's input is saved for it.
    needed = kept + layers * tokens * model.d_model * itemsize + 4 * logits
    needs = f'needs at least {needed / 1e9:,.1f} GB a device for blocks, logits and the state'
    fix = f'with {name}.grad_accum_steps (training alone) or its compute.loss_chunk'
    wrong = f'{key}={batch_size} {needs} of {name}, and {has} it smaller, or split it {fix}.'
    require(needed <= free, wrong)
