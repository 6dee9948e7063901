"""What the runs of a recipe hold and cost, known before anything is trained."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import rich.table
from rich import filesize

from bam_jax import cli, config
from bam_jax.config.strict import require
from bam_jax.model import arithmetic, transformer
from bam_jax.parallel import memory, sharding
from bam_jax.recipes import graph
from bam_jax.train import step

PARTS = ('embeddings', 'norms', 'attention', 'ffn', 'routers')  # the last three are of each layer


def account(
  recipe: config.Recipe, run: str = '', context: int = 0, against: str = ''
) -> dict[str, Any]:
  """The facts of a recipe's runs, or of one: the object that `bam_jax.account --help` describes.

  `context` is T of the attention's scores and of the budgets, 0 the data's sequence length;
  `against` is a run whose training FLOPs the others are to match. UserError for a run that is not
  in the recipe, or a mesh that does not divide a run's parameters.
  """
  nodes, context = graph.resolve(recipe), context or recipe.data.sequence_length
  asked = [find_run(nodes, 'run', run)] if run else nodes.values()
  rows = [_row(recipe, node, context) for node in asked]
  if against:
    budget = _row(recipe, find_run(nodes, 'against', against), context)['budget_flops']
    for row in rows:
      tokens = arithmetic.matched_tokens(nodes[row['run']].model, context, budget)
      row |= {'matched_tokens': tokens, 'matched_steps': tokens // row['step_tokens']}
  return {'recipe': recipe.name, 'context': context, 'against': against or None, 'rows': rows}


def gathered_bytes(model: config.Model, compute: config.Compute, mesh: config.Mesh) -> int:
  """Bytes of weights that a device of a mesh holds gathered while it computes gradients.

  They are one layer's, or with remat='none' those of all layers, in the compute dtype, except for
  FFN and soft attention experts on other devices; 0 where no weights are sharded.
  """
  if mesh.fsdp * mesh.expert == 1:
    return 0
  attention, ffn = model.attention_experts, model.ffn_experts
  matrices = arithmetic.attention_matrices(model, attention.num_experts if attention else 1)
  shared = matrices  # by all experts, and so not on other devices
  if model.soft_attention:
    keys_and_values = model.num_layers * 2 * model.d_model * model.num_kv_heads * model.head_dim
    shared = keys_and_values if attention.shared_kv else 0
  numbers = shared + (matrices - shared) // mesh.expert
  numbers += arithmetic.ffn_matrices(model, ffn.num_experts if ffn else 1) // (
    mesh.expert if ffn else 1
  )
  layers = 1 if compute.remat == 'none' else model.num_layers
  return numbers // layers // mesh.tensor * jnp.dtype(compute.dtype).itemsize


def find_run(nodes: Mapping[str, graph.Node], flag: str, name: str) -> graph.Node:
  """The run that a flag names; UserError when the recipe does not have it."""
  require(name in nodes, f'--{flag}={name} is not in the recipe, which has {", ".join(nodes)}.')
  return nodes[name]


def state_bytes(
  model: config.Model, compute: config.Compute, optimizer: config.Optimizer, mesh: config.Mesh
) -> dict[str, int]:
  """Bytes of a training state on each device of a mesh, float32.

  Activations, and the copies of weights in the compute dtype, come on top.
  """
  abstract_mesh = jax.sharding.AbstractMesh(dataclasses.astuple(mesh), sharding.AXES)
  state = step.abstract_state(model, compute, optimizer, abstract_mesh)
  params, opt_state = map(memory.device_bytes, (state.params, state.opt_state))
  total = 2 * params + opt_state
  return {'parameters': params, 'gradients': params, 'optimizer': opt_state, 'total': total}


def _row(recipe: config.Recipe, node: graph.Node, context: int) -> dict[str, Any]:
  model, run = node.model, node.run
  abstract = transformer.Network(model, run.compute).abstract()
  sharding.check(abstract, run.mesh, f'config.runs.{node.name}')
  with_total = lambda parts: dataclasses.asdict(parts) | {'total': parts.total}
  forward, steps = arithmetic.forward_parts(model, context), recipe.total_steps(node.name)
  step_tokens = recipe.step_tokens(node.name)
  return {
    'run': node.name,
    'label': run.label,
    'kind': node.kind,
    'method': node.method,
    'parameters': with_total(arithmetic.total_parts(model)),
    'active_parameters': with_total(arithmetic.active_parts(model)),
    'forward_flops': with_total(forward),
    'training_flops': with_total(arithmetic.training_parts(model, context)),
    'layer_forward_flops': {x: getattr(forward, x) // model.num_layers for x in PARTS[2:]},
    'cache_bytes': arithmetic.cache_bytes(model, run.compute.dtype),
    'cache_dtype': run.compute.dtype,
    'mesh': config.to_dict(run.mesh),
    'devices': run.mesh.size,
    'bytes_per_device': state_bytes(model, run.compute, run.optimizer, run.mesh),
    'gathered_bytes': gathered_bytes(model, run.compute, run.mesh),
    'steps': steps,
    'step_tokens': step_tokens,
    'tokens': steps * step_tokens,
    'budget_flops': steps * step_tokens * arithmetic.training_flops(model, context),
  }


def tables(facts: dict[str, Any]) -> list[rich.table.Table]:
  """What `account` returns, for a terminal."""
  parameters, flops, states, budgets = [], [], [], []
  counts = ['steps', 'tokens', *(['matched_steps', 'matched_tokens'] if facts['against'] else [])]
  for row in facts['rows']:
    run, forward, training = row['run'], row['forward_flops'], row['training_flops']
    parameters.append([run, *row['parameters'].values(), row['active_parameters']['total']])
    layer = row['layer_forward_flops'].values()
    flops.append([run, *layer, forward['embeddings'], forward['total'], training['total']])
    sizes = *row['bytes_per_device'].values(), row['gathered_bytes']
    held = [filesize.decimal(size, precision=2) for size in sizes]
    states.append([run, mesh_text(row['mesh']), row['devices'], *held, row['cache_bytes']])
    budgets.append([run, *(row[name] for name in counts), f'{row["budget_flops"]:.3e}'])
  title = f'FLOPs a token, context {facts["context"]:,}: of one layer forward, and of the model'
  of_flops = [*PARTS[2:], 'logits', 'forward', 'training']
  of_memory = ['devices', 'parameters', 'gradients', 'optimizer', 'total', 'gathered', 'cache']
  against = f'; matched: for the training FLOPs of {facts["against"]}' if facts['against'] else ''
  of_budgets = [*(name.replace('_', ' ') for name in counts), 'training FLOPs']
  holds = 'Bytes a device, without activations; of gathered weights; of the KV cache a token'
  return [
    cli.table('Parameters', ['run'], [*PARTS, 'total', 'active'], parameters),
    cli.table(title, ['run'], of_flops, flops),
    cli.table(holds, ['run', 'mesh'], of_memory, states),
    cli.table(f'Budgets{against}', ['run'], of_budgets, budgets),
  ]


def mesh_text(mesh: Mapping[str, int]) -> str:
  """The axes of more than one device."""
  return ' '.join(f'{axis}={size}' for axis, size in mesh.items() if size > 1) or 'one device'
