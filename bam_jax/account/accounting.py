"""What the runs of a recipe hold and cost, known before anything is trained."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import rich.table

from bam_jax import cli, config
from bam_jax.errors import UserError
from bam_jax.model import arithmetic, transformer
from bam_jax.parallel import sharding
from bam_jax.recipes import graph
from bam_jax.train import step

PARTS = ('embeddings', 'norms', 'attention', 'ffn', 'routers')


def account(
  recipe: config.Recipe, names: Sequence[str] = (), context: int = 0, against: str = ''
) -> dict[str, Any]:
  """The facts of a recipe's runs.

  Args:
    recipe: any; its data need not exist, nor the devices of its meshes.
    names: of runs; empty is all.
    context: T of the attention's scores and of the budgets; 0 is the data's sequence length.
    against: a run whose training FLOPs the others are to match; empty is none.

  Returns:
    The object that `python -m bam_jax.account --help` describes.

  Raises:
    UserError: a run that is not in the recipe, or a mesh that does not divide a run's parameters.
  """
  nodes, context = graph.resolve(recipe), context or recipe.data.sequence_length
  for flag, name in (*(('run', name) for name in names), ('against', against)):
    if name and name not in nodes:
      raise UserError(f'--{flag}={name} is not in the recipe, which has {", ".join(nodes)}.')
  rows = [_row(recipe, nodes[name], context) for name in nodes if not names or name in names]
  if against:
    budget = _row(recipe, nodes[against], context)['budget_flops']
    for row in rows:
      tokens = arithmetic.matched_tokens(nodes[row['run']].model, context, budget)
      row |= {'matched_tokens': tokens, 'matched_steps': tokens // row['step_tokens']}
  return {'recipe': recipe.name, 'context': context, 'against': against or None, 'rows': rows}


def state_bytes(
  model: config.Model, compute: config.Compute, optimizer: config.Optimizer, mesh: config.Mesh
) -> dict[str, int]:
  """Bytes of a training state on each device of a mesh, float32.

  Activations, and the copies of weights in the compute dtype, come on top.
  """
  abstract_mesh = jax.sharding.AbstractMesh(dataclasses.astuple(mesh), sharding.AXES)
  state = step.abstract_state(model, compute, optimizer, abstract_mesh)

  def on_device(tree: Any) -> int:
    here = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != sharding.HOST]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in here)

  params, opt_state = on_device(state.params), on_device(state.opt_state)
  total = 2 * params + opt_state
  return {'parameters': params, 'gradients': params, 'optimizer': opt_state, 'total': total}


def _row(recipe: config.Recipe, node: graph.Node, context: int) -> dict[str, Any]:
  model, run = node.model, node.run
  abstract = transformer.Network(model, run.compute).abstract()
  sharding.check(abstract, run.mesh, f'config.runs.{node.name}')
  with_total = lambda parts: dataclasses.asdict(parts) | {'total': parts.total}
  forward, steps = arithmetic.forward_parts(model, context), recipe.total_steps(node.name)
  tokens = steps * recipe.step_tokens(node.name)
  return {
    'run': node.name,
    'label': run.label,
    'kind': node.kind,
    'method': node.method,
    'parameters': with_total(arithmetic.total_parts(model)),
    'active_parameters': with_total(arithmetic.active_parts(model)),
    'forward_flops': with_total(forward),
    'training_flops': with_total(arithmetic.training_parts(model, context)),
    'layer_forward_flops': {
      part: getattr(forward, part) // model.num_layers for part in ('attention', 'ffn', 'routers')
    },
    'cache_bytes': arithmetic.cache_bytes(model, run.compute.dtype),
    'cache_dtype': run.compute.dtype,
    'mesh': config.to_dict(run.mesh),
    'devices': run.mesh.size,
    'bytes_per_device': state_bytes(model, run.compute, run.optimizer, run.mesh),
    'steps': steps,
    'step_tokens': recipe.step_tokens(node.name),
    'tokens': tokens,
    'budget_flops': tokens * arithmetic.training_flops(model, context),
  }


def tables(facts: dict[str, Any]) -> list[rich.table.Table]:
  """What `account` returns, for a terminal."""
  parameters, flops, memory, budgets = [], [], [], []
  matched = ('matched_steps', 'matched_tokens') if facts['against'] else ()
  for row in facts['rows']:
    run, forward = row['run'], row['forward_flops']
    active, training = row['active_parameters']['total'], row['training_flops']['total']
    parameters.append([run, *row['parameters'].values(), active])
    layer = row['layer_forward_flops'].values()
    flops.append([run, *layer, forward['embeddings'], forward['total'], training])
    mesh = ' '.join(f'{axis}={size}' for axis, size in row['mesh'].items() if size > 1) or '-'
    held = [_size(size) for size in row['bytes_per_device'].values()]
    memory.append([run, mesh, row['devices'], *held, row['cache_bytes']])
    names = ('steps', 'tokens', *matched)
    budgets.append([run, *(row[name] for name in names), f'{row["budget_flops"]:.3e}'])
  against = f'; matched: for the training FLOPs of {facts["against"]}' if matched else ''
  columns = [name.replace('_', ' ') for name in ('steps', 'tokens', *matched)]
  return [
    cli.table('Parameters', ['run'], [*PARTS, 'total', 'active'], parameters),
    cli.table(
      f'FLOPs a token, context {facts["context"]:,}: of one layer forward, and of the model',
      ['run'],
      ['attention', 'ffn', 'routers', 'logits', 'forward', 'training'],
      flops,
    ),
    cli.table(
      'Bytes a device, without activations, and of the KV cache a token',
      ['run', 'mesh'],
      ['devices', 'parameters', 'gradients', 'optimizer', 'total', 'cache'],
      memory,
    ),
    cli.table(f'Budgets{against}', ['run'], [*columns, 'training FLOPs'], budgets),
  ]


def _size(number: int) -> str:
  return f'{number / 1e9:.2f} GB' if number >= 1e9 else f'{number / 1e6:.1f} MB'
