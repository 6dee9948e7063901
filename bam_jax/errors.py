"""The one exception a user should ever see, and what else is told in a sentence."""

import os
import sys

import jax

USER_ERROR = 2  # exit status of a user's mistake

subcommand = ''  # the one that is running, if the command has any; `cli.run_subcommands` sets it

# Of the runtime's errors: where a program is started they are ValueErrors of such a beginning.
STATUSES = ('ABORTED', 'CANCELLED', 'DEADLINE_EXCEEDED', 'INTERNAL', 'UNAVAILABLE', 'UNKNOWN')


class UserError(Exception):
  """A mistake that the user can fix: one sentence, naming the key or file and the fix.

  The commands print it without a traceback and exit with status 2.
  """


def sentence(error: BaseException) -> str | None:
  """What a user reads of an error that can be fixed, be it Python's or JAX's; None of another."""
  said = str(error).partition('\n')[0]
  if isinstance(error, UserError):
    return str(error)
  if isinstance(error, OSError) and error.filename is not None:
    return f'{os.fsdecode(error.filename)} cannot be used: {error.strerror}.'
  if isinstance(error, MemoryError) or (of_jax(error) and 'RESOURCE_EXHAUSTED' in said):
    return f'the memory does not suffice ({said}): ask for less at once.'
  return None


def of_jax(error: BaseException | None) -> bool:
  """Whether the runtime of JAX raised it, as it does where another process was lost."""
  if isinstance(error, ValueError):
    return str(error).startswith(tuple(f'{status}: ' for status in STATUSES))
  return isinstance(error, jax.errors.JaxRuntimeError)


def program_name() -> str:
  """The command as the user typed it: `bam_jax.evaluate`, `bam_jax.convert upcycle`."""
  file = sys.argv[0].removesuffix(f'{os.sep}__main__.py')
  name = os.path.splitext(os.path.basename(file))[0]
  return f'bam_jax.{name} {subcommand}'.rstrip()
