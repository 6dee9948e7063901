"""lm-eval's own command line, with the model `bam_jax` and the group `bam_paper`.

    python -m bam_jax.tasks run --model bam_jax --model_args checkpoint=DIR --tasks arc_easy
    python -m bam_jax.tasks run --model bam_jax --model_args checkpoint=DIR,dtype=bfloat16,fsdp=4 \\
        --tasks bam_paper --batch_size 16 --confirm_run_unsafe_code

Everything else is lm-eval's. With --confirm_run_unsafe_code tasks may run programs written by
the model: bam_humaneval and bam_mbpp within the limits of `bam_jax.tasks.sandbox`, others
without limits.
"""

import sys

from bam_jax.errors import UserError
from bam_jax.parallel import compilation
from bam_jax.tasks import session


def main() -> int:
  """Runs the command line; returns the exit status."""
  try:
    from lm_eval.__main__ import cli_evaluate

    from bam_jax.tasks import adapter
  except ImportError:
    print(f'bam_jax.tasks: lm-eval is not installed: {session.INSTALL}.', file=sys.stderr)
    return 2
  arguments = sys.argv[1:]
  if '--model' in arguments and not any(a.startswith('--include_path') for a in arguments):
    sys.argv += ['--include_path', session.GROUPS]
  compilation.use_cache()
  try:
    cli_evaluate()
  except UserError as error:
    print(f'{adapter.NAME}: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
