"""Counts parameters, FLOPs and memory of a recipe's runs; requires neither data nor devices.

    python -m bam_jax.account --config=configs/small_590m.py --run=bam_kv --context=256
    python -m bam_jax.account --config=configs/small_590m.py --against=btx

Tables go to standard error, `--json` writes `recipe`, `context`, `against` and `rows`, one a run:
  run, label, kind, method: as in the report of bam_jax.main.
  parameters, active_parameters: by part: `embeddings`, `norms`, `attention`, `ffn`, `routers`, and
    `total`. Active parameters are those one token uses: of routed experts the top-k.
  forward_flops, training_flops: of one token, by the same parts; 2 for a multiply and add, matrix
    products only (`embeddings` is the logits), causal scores at half the context, nothing
    recomputed.
  layer_forward_flops: of one layer: `attention`, `ffn`, `routers`.
  cache_bytes, cache_dtype: keys and values of one token, in the run's compute dtype.
  mesh, devices, bytes_per_device: `parameters`, `gradients`, `optimizer` and `total`, float32;
    excluding activations.
  gathered_bytes: of sharded weights, held gathered for the backward pass: one layer's, or with
    remat=none all layers'.
  steps, step_tokens, tokens, budget_flops: of the training, in whole steps.
  matched_tokens, matched_steps: with --against=RUN, what RUN's `budget_flops` buy for this run.

docs/paper.md lists errors in the paper's own counts.
"""

from typing import Any

import jax
from absl import flags

from bam_jax import cli
from bam_jax.account import accounting

_CONFIG = cli.define_recipe()
_RUN = flags.DEFINE_string('run', None, 'The run to count; default: every run.')
_AGAINST = flags.DEFINE_string('against', None, 'A run whose training FLOPs to match.')
_CONTEXT = flags.DEFINE_integer('context', None, 'Tokens; default: the sequence_length.', 1)


def main() -> dict[str, Any]:
  """Counts what the flags select, and prints it."""
  jax.config.update('jax_platforms', 'cpu')  # counting must not occupy the accelerator
  recipe = cli.read_recipe(_CONFIG)
  facts = accounting.account(recipe, _RUN.value or '', _CONTEXT.value or 0, _AGAINST.value or '')
  for table in accounting.tables(facts):
    cli.console().print(table, '')
  return facts


if __name__ == '__main__':
  cli.run(main)
