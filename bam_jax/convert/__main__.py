"""Checkpoints in, checkpoints out: strict, streaming, in bounded memory.

    python -m bam_jax.convert upcycle --from=SEED --from=CODE --method=bam_kv_experts --output=DIR
    python -m bam_jax.convert inspect DIR [OTHER]

Subcommands:
  upcycle         mixes dense checkpoints into a mixture's checkpoint
  mix             the same, ready to use without training, and scores it
  add-expert      adds a dense model to a mixture
  drop-expert     drops an expert of a mixture
  replace-expert  puts a dense model in the place of a mixture's expert
  import-hf       converts a Hugging Face model to a checkpoint
  export-hf       converts a checkpoint to a Hugging Face model
  inspect         describes a checkpoint, or compares two

`python -m bam_jax.convert SUBCOMMAND --help` lists its flags. An --output is complete or absent.
"""

from bam_jax import cli

# Each is a module with flags, a docstring for --help, and `main`.
SUBCOMMANDS = {
  'upcycle': 'bam_jax.convert.upcycle',
  'mix': 'bam_jax.convert.mix',
  'add-expert': 'bam_jax.convert.experts',
  'drop-expert': 'bam_jax.convert.experts',
  'replace-expert': 'bam_jax.convert.experts',
  'import-hf': 'bam_jax.convert.import_hf',
  'export-hf': 'bam_jax.convert.export_hf',
  'inspect': 'bam_jax.convert.inspect',
}

if __name__ == '__main__':
  cli.run_subcommands(SUBCOMMANDS)
