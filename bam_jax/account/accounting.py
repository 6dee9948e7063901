"""What the runs of a recipe hold and cost, known before anything is trained."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import rich.table

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.model import arithmetic, transformer
from bam_jax.parallel import sharding
from bam_jax.recipes import graph
from bam_jax.train import step
from bam_jax.upcycle import rules

SMALL = config.Model(
  vocab_size=256_000, d_model=1024, num_layers=6, num_heads=8, num_kv_heads=8, head_dim=128,
  ffn_dim=2048, tied_embeddings=False,
)  # fmt: skip


def _small(method: config.Method, **options) -> config.Model:
  return rules.mixture_model(
    SMALL, config.Upcycle(('seed', 'code', 'law', 'math'), method, **options)
  )


# Where the paper's table 9 contradicts its own text or architecture.
ERRATA = (
  (
    _small('bam_kv_experts'),
    "the paper's table 9 gives 662,731,776 active parameters: it counts one of the two routers.",
  ),
  (
    _small('bam_shared_kv'),
    "the paper's table 9 gives 612,400,128 active parameters: it leaves out the shared keys and "
    'values, and one of the two routers.',
  ),
  (
    _small('btx', num_experts=6, top_k=3),
    "the last column of the paper's table 9 repeats the total of 4 experts, 700,480,512; its text "
    'says 776M.',
  ),
)


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
    UserError: a run that the recipe lacks, or a mesh that does not divide a run's parameters.
  """
  nodes, context = graph.resolve(recipe), context or recipe.data.sequence_length
  for flag, name in (*(('run', name) for name in names), *([('against', against)] * bool(against))):
    if name not in nodes:
      raise UserError(f'--{flag} names {name!r}; the recipe has {", ".join(nodes)}.')
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
  return {
    'parameters': params,
    'gradients': params,
    'optimizer': opt_state,
    'total': 2 * params + opt_state,
  }


def notes(model: config.Model) -> list[str]:
  """What must be known to compare a model's numbers with the paper's."""
  return [note for paper, note in ERRATA if _counts_like(model) == paper]


def tables(facts: dict[str, Any]) -> list[rich.table.Table]:
  """What `account` returns, for a terminal."""
  rows, context, against = facts['rows'], facts['context'], facts['against']
  parts = ('embeddings', 'norms', 'attention', 'ffn', 'routers')
  result = [
    _table(
      'Parameters',
      (*parts, 'total', 'active'),
      [
        [row['run'], *row['parameters'].values(), row['active_parameters']['total']] for row in rows
      ],
    ),
    _table(
      f'FLOPs a token, context {context:,}: of one layer forward, and of the model',
      ('attention', 'ffn', 'routers', 'logits', 'forward', 'training'),
      [
        [
          row['run'],
          *row['layer_forward_flops'].values(),
          row['forward_flops']['embeddings'],
          row['forward_flops']['total'],
          row['training_flops']['total'],
        ]
        for row in rows
      ],
    ),
    _table(
      'Bytes a device, without activations, and of the KV cache a token',
      ('mesh', 'devices', 'parameters', 'gradients', 'optimizer', 'total', 'cache'),
      [
        [
          row['run'],
          ' '.join(f'{axis}={size}' for axis, size in row['mesh'].items() if size > 1) or '-',
          row['devices'],
          *(_size(size) for size in row['bytes_per_device'].values()),
          row['cache_bytes'],
        ]
        for row in rows
      ],
    ),
  ]
  matched = ('matched_steps', 'matched_tokens') if against else ()
  title = f'Budgets; matched: for the training FLOPs of {against}' if against else 'Budgets'
  names = ('steps', 'tokens', *matched)
  body = [
    [row['run'], *(row[name] for name in names), f'{row["budget_flops"]:.3e}'] for row in rows
  ]
  columns = [name.replace('_', ' ') for name in names]
  return [*result, _table(title, (*columns, 'training FLOPs'), body)]


def _row(recipe: config.Recipe, node: graph.Node, context: int) -> dict[str, Any]:
  model, run = node.model, node.run
  sharding.check(
    transformer.Network(model, run.compute).abstract(), run.mesh, f'config.runs.{node.name}'
  )
  forward, steps = arithmetic.forward_parts(model, context), recipe.total_steps(node.name)
  tokens = steps * recipe.step_tokens(node.name)
  return {
    'run': node.name,
    'label': run.label,
    'kind': node.kind,
    'method': node.upcycle.method if node.upcycle else None,
    'parameters': _by_part(arithmetic.total_parts(model)),
    'active_parameters': _by_part(arithmetic.active_parts(model)),
    'forward_flops': _by_part(forward),
    'training_flops': _by_part(arithmetic.training_parts(model, context)),
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
    'notes': notes(model),
  }


def _by_part(parts: arithmetic.Parts) -> dict[str, int]:
  return dataclasses.asdict(parts) | {'total': parts.total}


def _counts_like(model: config.Model) -> config.Model:
  """A model without what its counts do not depend on."""
  attention, ffn = model.attention_experts, model.ffn_experts
  return dataclasses.replace(
    model,
    rope_theta=SMALL.rope_theta,
    norm_epsilon=SMALL.norm_epsilon,
    logit_scale=SMALL.logit_scale,
    attention_experts=attention and dataclasses.replace(attention, renormalize=False),
    ffn_experts=ffn and dataclasses.replace(ffn, renormalize=False, capacity_factor=0.0),
  )


def _size(number: int) -> str:
  return f'{number / 1e9:.2f} GB' if number >= 1e9 else f'{number / 1e6:.1f} MB'


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence]) -> rich.table.Table:
  table = rich.table.Table(title=title, title_justify='left', box=None, pad_edge=False)
  table.add_column('run', overflow='fold')
  for column in columns:
    # Where the terminal is narrow, parts are folded before totals, and nothing is cut off.
    table.add_column(column, justify='right', overflow='fold', no_wrap=column in columns[-2:])
  for run, *cells in rows:
    table.add_row(run, *(f'{cell:,}' if isinstance(cell, int) else cell for cell in cells))
  return table
