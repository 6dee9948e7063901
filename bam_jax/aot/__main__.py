"""Compiles a run's real train or decode step for TPUs that are not at hand, and analyses it.

    python -m bam_jax.aot --config=configs/large_2b.py --run=bam_kv --topology=v5p:4x4x4
    python -m bam_jax.aot --config=... --run=... --topology=v5e:4x4 --sequences_per_chip=2 --search
    python -m bam_jax.aot --config=... --run=... --topology=v5p:4x4x4 --slices=2 --hlo=step.txt
    python -m bam_jax.aot --config=... --run=... --topology=v5e:2x2 --phase=decode --context=272

Requires the TPU compiler on any Linux machine, `pip install 'jax[tpu]'`, but neither a TPU nor the
recipe's data. Chips: v4, v5e, v5p, v6e. The mesh is the run's: `--config.runs.bam_kv.mesh.fsdp=16`.
docs/aot.md explains the numbers.

Tables go to standard error. `--json` writes, for one step, FLOPs of all chips, all else per chip:
  phase, run, label, topology, slices, chips, mesh, compute, batch_size, grad_accum_steps,
    sequences_per_chip, sequence_length, versions: what was compiled.
  fits, hbm_limit_bytes, peak_bytes, headroom_bytes, memory: `arguments`, `temporaries`, `outputs`,
    `aliased`; the peak is their sum, aliased outputs counted once. For a step that does not fit
    `reason`, the compiler's, and nothing else.
  model_flops, compiled_flops, flops_ratio, uncounted_kernels: `matmul`, `grouped` (rows at even
    load), `attention` and other kernels, `total`; over what the model needs; what is not known.
  hbm_bytes: read and written.
  collectives: `kind`, `axes`, `count`, `asynchronous` (how many of them), `operand_bytes`,
    `wire_bytes` sent by a chip, `seconds` on its links.
  seconds, mfu, tokens_per_second_per_chip: three bounds: `roofline` (all overlaps), `in_order`,
    `no_overlap`; seconds also of `compute`, `hbm`, `wire` by axes, `between_slices`.
With --phase=decode a step is one token of each row, with these keys of its own:
  dtype, context, slots: what was compiled; tokens of a row, and the cache's room for them.
  needed_bytes, hbm_ratio: `weights` and `cache` that a chip must read; `hbm_bytes` over them.
  tokens_per_second: of all rows, for each bound.
With --search:
  candidates, flags: what was compiled, best first: `mesh`, `compute`, `grad_accum_steps`,
    `sequences_per_chip`, `fits`, `peak_bytes`, `seconds`, `mfu`; and the overrides that give the
    best, which all other keys describe.
"""

from typing import Any

import jax
from absl import flags

from bam_jax import cli
from bam_jax.account import accounting
from bam_jax.aot import program, report, search, topology
from bam_jax.config.strict import require
from bam_jax.recipes import graph

_CONFIG = cli.define_recipe()
_RUN = flags.DEFINE_string('run', None, 'The run whose step to compile.')
_PHASE = flags.DEFINE_enum('phase', 'train', ['train', 'decode'], 'Which step to compile.')
_TOPOLOGY = flags.DEFINE_string('topology', None, 'For example v5e:4x4 or v5p:4x4x4.')
_SLICES = flags.DEFINE_integer('slices', 1, 'Number of slices of that topology.', lower_bound=1)
_SEQUENCES = flags.DEFINE_integer('sequences_per_chip', None, 'In a step without accumulation.', 1)
_BATCH = flags.DEFINE_integer('batch_size', 1, 'Decode: number of rows.', lower_bound=1)
_CONTEXT = flags.DEFINE_integer('context', None, "Decode: tokens a row; default: the recipe's.", 1)
_DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['float32', 'bfloat16'], 'Decode: of all arrays.')
_SEARCH = flags.DEFINE_bool('search', False, 'Search for mesh, remat and sequences a chip.')
_TRAIN, _DECODE = (_SEQUENCES, _SEARCH), (_BATCH, _CONTEXT, _DTYPE)


def main() -> dict[str, Any]:
  """Compiles the step that the flags select, and prints the analysis."""
  jax.config.update('jax_platforms', 'cpu')  # compiling must not occupy the accelerator
  # Programs for absent devices can be written to the cache but not read back.
  jax.config.update('jax_enable_compilation_cache', False)
  recipe = cli.read_recipe(_CONFIG)
  for flag in (_RUN, _TOPOLOGY):
    require(flag.value, f'--{flag.name} is required.')
  node = accounting.find_run(graph.resolve(recipe), 'run', _RUN.value)
  job = program.Job(_RUN.value, node.model, node.run, recipe.data.sequence_length)
  target = topology.parse(_TOPOLOGY.value, _SLICES.value)
  other, unread = ('decode', _DECODE) if _PHASE.value == 'train' else ('train', _TRAIN)
  for flag in unread:
    wrong = f'--{flag.name} requires --phase={other}: remove it, or set that phase.'
    require(not flag.present, wrong)
  devices = target.devices()
  if _SEARCH.value:
    facts = search.search(job, target, devices, _SEQUENCES.value)
  elif _PHASE.value == 'train':
    job = job.with_sequences(_SEQUENCES.value) if _SEQUENCES.value else job
    mesh = program.make_mesh(job, devices, target)
    facts = report.train_facts(job, target, mesh, program.compile_train(job, mesh))
  else:
    context = _CONTEXT.value or recipe.data.sequence_length
    decode = program.Decode(_BATCH.value, context, _DTYPE.value)
    mesh = program.make_mesh(job, devices, target)
    decoder = program.make_decoder(job, decode, mesh)
    compiled = program.compile_decode(decoder, decode, mesh)
    facts = report.decode_facts(job, decode, target, mesh, decoder, compiled)
  for table in report.tables(facts):
    cli.console().print(table, '')
  return facts


if __name__ == '__main__':
  cli.run(main)
