"""The one exception a user should ever see."""


class UserError(Exception):
  """A mistake that the user can mend: one sentence, naming the key or file and the fix.

  The commands print it without a traceback and exit with status 2.
  """
