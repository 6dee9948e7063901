"""Checkpoints in, checkpoints out; strict, and with little memory however large they are.

    python -m bam_jax.convert upcycle --from=SEED --from=CODE --method=bam_kv_experts --output=DIR
    python -m bam_jax.convert inspect DIR [OTHER]

Subcommands:
  upcycle     dense checkpoints to a mixture's
  import-hf   a folder for transformers to a checkpoint
  export-hf   a checkpoint to a folder for transformers
  inspect     what a checkpoint is, or how two differ

`python -m bam_jax.convert SUBCOMMAND --help` lists its flags. An --output is complete or not there.
"""

from bam_jax import cli

# Each is a module: its flags, its docstring for --help, and its `main`.
SUBCOMMANDS = {
  'upcycle': 'bam_jax.convert.upcycle',
  'import-hf': 'bam_jax.convert.import_hf',
  'export-hf': 'bam_jax.convert.export_hf',
  'inspect': 'bam_jax.convert.inspect',
}

if __name__ == '__main__':
  cli.run_subcommands(SUBCOMMANDS)
