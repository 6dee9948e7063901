"""The one exception a user should ever see, and other errors that are reported in one line."""

import os
import sys

import jax

USER_ERROR = 2  # exit status of a user's mistake

subcommand = ''  # the one that is running, if any; set by `cli.run_subcommands`

# Prefixes of the runtime's errors, which are ValueErrors where a program is dispatched.
STATUSES = ('ABORTED', 'CANCELLED', 'DEADLINE_EXCEEDED', 'INTERNAL', 'UNAVAILABLE', 'UNKNOWN')


class UserError(Exception):
  """A mistake that the user can fix: a one-line message with the key or file and the fix.

  The commands print it without a traceback and exit with status 2.
  """


def sentence(error: BaseException) -> str | None:
  """The message for an error that the user can fix, Python's or JAX's; None for any other."""
  said = str(error).partition('\n')[0]
  if isinstance(error, UserError):
    return str(error)
  if isinstance(error, OSError) and error.filename is not None:
    return f'{os.fsdecode(error.filename)} cannot be used: {error.strerror}.'
  if isinstance(error, MemoryError) or (of_jax(error) and 'RESOURCE_EXHAUSTED' in said):
    return f'out of memory ({said or "host memory"}): reduce the batch size or the model.'
  return None


def of_jax(error: BaseException | None) -> bool:
  """Whether JAX's runtime raised it, as it does when another process is lost."""
  if isinstance(error, ValueError):
    return str(error).startswith(tuple(f'{status}: ' for status in STATUSES))
  return isinstance(error, jax.errors.JaxRuntimeError)


def program_name() -> str:
  """The command as the user typed it: `bam_jax.evaluate`, `bam_jax.convert upcycle`."""
  file = sys.argv[0].removesuffix(f'{os.sep}__main__.py')
  name = os.path.splitext(os.path.basename(file))[0]
  return f'bam_jax.{name} {subcommand}'.rstrip()
