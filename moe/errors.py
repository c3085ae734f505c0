"""What a user can mend, and what a store raises."""

import sys


class UserError(Exception):
  """One line of cause and remedy; tools print it without a traceback and exit with 2."""


def storage_errors() -> tuple[type[Exception], ...]:
  """For `except`: what a file or an object that cannot be read or written raises."""
  gcsfs = sys.modules.get("gcsfs.retry")
  return (OSError, gcsfs.HttpError) if gcsfs else (OSError,)
